"""Counts equal arithmetic by hand, on every device, and no operator is left out in silence."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import flop_counter

import octic.models  # noqa: F401  registers the models
from utils.errors import UserError
from utils.flops import count_one_image, count_operations, multiply_adds

on_each_device = pytest.mark.parametrize("device", ["cpu", "meta"])


@torch.library.custom_op("flops_test::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@product.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("flops_test::gradient", mutates_args=())
def gradient(grad: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return grad @ b.T


@gradient.register_fake
def _(grad, b):
    return grad.new_empty(grad.shape[0], b.shape[0])


product.register_autograd(
    lambda ctx, grad: (gradient(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


@on_each_device
def test_attention_counts_its_two_products(device):
    """torch's own counter gives 0 on a CPU: batch, heads, tokens^2, channels, 2 products of 2."""
    qkv = torch.randn(3, 2, 4, 7, 16, device=device, requires_grad=True)
    count = count_operations(lambda x: F.scaled_dot_product_attention(*x), qkv)
    assert count.forward == 2 * 4 * 7 * 7 * 16 * 4
    assert count.backward == 2 * count.forward
    assert not count.uncounted


@on_each_device
@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_counts_twice_backward_in_groups_too(device, groups):
    net = nn.Conv2d(8, 12, 3, padding=1, groups=groups, device=device)
    images = torch.zeros(2, 8, 6, 6, device=device, requires_grad=True)
    count = count_operations(net, images)
    assert count.forward == 2 * 2 * 36 * 12 * (8 // groups) * 9
    assert count.backward == 2 * count.forward


def test_linear_by_hand_and_the_first_layer_needs_no_gradient_of_images():
    net = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    count = count_operations(net, torch.zeros(4, 5))
    assert count.forward == 2 * 4 * (5 * 7 + 7 * 3)
    assert count.backward == 2 * 4 * (5 * 7 + 2 * 7 * 3)
    assert count.total == count.forward + count.backward
    assert count_operations(net, torch.zeros(4, 5), backward=False).backward == 0


@pytest.mark.parametrize("name", ["hybrid_deit_small_patch16", "vit_tiny_patch16_224"])
def test_the_cpu_counts_what_meta_counts(name):
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            net = timm.create_model(name, img_size=32, depth=2, num_classes=3)
        counts.append(count_one_image(net, 32))
        assert counts[-1].forward // 2 == multiply_adds(net, 32)
    assert counts[0][:2] == counts[1][:2]
    assert counts[0].forward_calls < counts[1].forward_calls, "attention is one operator on a CPU"


def test_multihead_attention_is_counted_in_eval_mode():
    """Its fused operator would swallow the projections."""
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval().requires_grad_(False)
    count = count_operations(net, torch.zeros(1, 9, 16), backward=False)
    assert count.forward == 2 * (9 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 9 * 9 * 16)
    assert not count.uncounted
    assert torch.backends.mha.get_fastpath_enabled()


@on_each_device
def test_an_unknown_product_is_named_forward_and_backward(device):
    a = torch.zeros(4, 6, device=device, requires_grad=True)
    b = torch.zeros(6, 3, device=device)
    count = count_operations(lambda x: product(x, b) + (x @ b), a)
    assert count.uncounted == ("flops_test.gradient", "flops_test.product")
    assert count_operations(lambda x: product(x, b), a, backward=False).uncounted == (
        "flops_test.product",
    )


def test_a_formula_makes_it_known(monkeypatch):
    def formula(a, b, out_shape=None, **_):
        return 2 * a[0] * a[1] * b[1]

    packet = torch.ops.flops_test.product
    monkeypatch.setitem(flop_counter.flop_registry, packet, flop_counter.shape_wrapper(formula))
    count = count_operations(
        lambda x: product(x, torch.zeros(6, 3)), torch.zeros(4, 6), backward=False
    )
    assert count.forward == 2 * 4 * 6 * 3 and not count.uncounted


def test_a_wrong_size_is_one_line():
    net = timm.create_model("hybrid_deit_small_patch16", depth=2)
    with pytest.raises(UserError, match="the backbone does not take 30 x 30 pixels"):
        multiply_adds(net, 30)
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224", depths=[1, 1, 1, 1])
    with pytest.raises(UserError, match="does not take 30 x 30 pixels: Input height"):
        multiply_adds(swin, 30)
