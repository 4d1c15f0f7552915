"""Streamed attention equals the materialised one, in outputs and gradients, and keeps less."""

import math

import pytest
import torch
from torch import Tensor

from baselines.gevit.attention import GroupSelfAttention, LiftingSelfAttention
from baselines.gevit.streaming import summed_probabilities, tile_sizes


def materialised(layer: GroupSelfAttention, x: Tensor) -> Tensor:
    """The published order of work: every score at once, each v with its own products."""
    probabilities = layer.probabilities(x)  # [B N v g H W m J]
    size = layer.neighbours.size
    values = layer.value(x).unflatten(1, (layer.mid_channels, layer.num_heads))
    values = torch.nn.functional.pad(values, (size // 2,) * 4)
    windows = values.unfold(4, size, 1).unfold(5, size, 1).flatten(-2)  # [B c N m H W J]
    y = torch.einsum("bnvghwmj,bcnmhwj->bcnvhw", probabilities, windows)
    return layer.wout(y.flatten(1, 2))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("memory_mb", [64.0, 0.01, 1e-6])
def test_tiles_change_nothing(memory_mb, recompute):
    """Whatever is attended for at once, outputs and gradients are those of the whole."""
    layer = GroupSelfAttention("p4m", 3, 5, 4, 2, window=3, memory_mb=memory_mb).double()
    layer.recompute = recompute
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 8, 5, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 4, 8, 5, 6, dtype=torch.float64)
    found, expected = layer(x), materialised(layer, x)
    torch.testing.assert_close(found, expected)
    variables = [x, *layer.parameters()]
    ours = torch.autograd.grad((found * cotangent).sum(), variables)
    theirs = torch.autograd.grad((expected * cotangent).sum(), variables)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


def test_a_program_takes_any_number_of_images():
    """Exported, rows may be attended for in turns, images only together."""
    layer = GroupSelfAttention("mz2", 3, 5, 4, 1, window=3, memory_mb=1e-6).eval()
    images, batch = torch.randn(2, 3, 2, 2, 3), torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(layer, (images,), dynamic_shapes=({0: batch},))
        for count in (1, 3):
            x = torch.randn(count, 3, 2, 2, 3)
            torch.testing.assert_close(program.module()(x), layer(x))


def test_gradients_by_differences():
    shapes = [(2, 3, 2, 4), (2, 3, 5, 4), (2, 3, 5, 2)]
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(summed_probabilities, tuple(parts))
    assert torch.autograd.gradcheck(lambda c, p: summed_probabilities(c, p, None), parts[:2])


def test_dropout_is_the_same_in_the_backward_pass_and_true_on_average():
    """The gradient is that of the very outputs, and probabilities keep their expectation."""
    content = torch.zeros(4000, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    position = torch.zeros(4000, 1, 1, 4, dtype=torch.float64)
    shares = summed_probabilities(content, position, None, 0.25)
    dropped = shares == 0
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(shares.detach().sum((-1, -2)).mean()) == pytest.approx(1, abs=0.01)
    (gradient,) = torch.autograd.grad(shares[..., 0, 0].sum(), content)
    rows = dropped[:, 0, 0, 0]
    assert (gradient[rows] == 0).all() and (gradient[~rows][..., 0, 0] != 0).all()


def test_gradients_under_dropout_by_differences():
    """Each output element draws its own, and the backward pass the same ones."""
    content = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    position = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def seeded(content: Tensor, position: Tensor) -> Tensor:
        torch.manual_seed(0)
        return summed_probabilities(content, position, None, 0.5)

    assert torch.autograd.gradcheck(seeded, (content, position))
    still = torch.zeros(1, 1, 4, 64)
    outputs = summed_probabilities(still, torch.zeros(1, 1, 2, 64), None, 0.5)
    assert not torch.equal(outputs[:, 0], outputs[:, 1])


def test_recomputed_dropout_is_the_one_of_the_forward_pass():
    """Of the same draws, keeping scores and computing them anew give the same gradients."""
    layer = GroupSelfAttention("p4", 3, 5, 4, 2, window=3, attn_drop_rate=0.5, memory_mb=1e-6)
    layer.double()
    x = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    gradients = []
    for recompute in (True, False):
        layer.recompute = recompute
        torch.manual_seed(0)
        loss = layer(x).square().sum()
        gradients.append(torch.autograd.grad(loss, layer.value.weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recompute", [True, False])
def test_dropout_of_layers_repeats_with_the_seed(recompute):
    layer = GroupSelfAttention("p4", 3, 5, 4, 2, window=3, attn_drop_rate=0.5, memory_mb=1e-6)
    layer.recompute = recompute
    x = torch.randn(2, 3, 4, 5, 5)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        results.append((y, layer.query.weight.grad.clone()))
    for first, second in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(first, second)
    assert not torch.allclose(results[0][0], results[2][0])
    assert torch.equal(layer.eval()(x), layer(x))


def kept_for_backward(layer: torch.nn.Module, x: Tensor) -> int:
    """Most numbers of one tensor that a forward pass keeps."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return max(sizes)


def test_nothing_cubic_is_kept():
    """|G|^3 J numbers per head and pixel in the published form; ours keeps |G|^2 J or |G| alone."""
    layer = GroupSelfAttention("p8m", 6, 6, 6, 2, window=5, recompute=False)
    x = torch.randn(1, 6, 16, 6, 6)
    per_pair = 2 * 36 * 25  # heads, pixels, keys
    assert kept_for_backward(layer, x) <= per_pair * 16**2 * 1.01
    layer.recompute = True
    assert kept_for_backward(layer, x) < per_pair * 16


def test_tile_sizes():
    """Whole images first, then rows of one, at least one row."""
    assert tile_sizes(8, 10, 1000, 1.0) == (8, 10)
    assert tile_sizes(8, 10, 20_000, 1.0) == (5, 10)
    assert tile_sizes(8, 10, 300_000, 1.0) == (1, 3)
    assert tile_sizes(8, 10, 10**9, 1.0) == (1, 1)


def test_any_size_in_a_window_one_size_without():
    """Oblong maps, masks of their own for every size; a whole map has the size it was built for."""
    lift = LiftingSelfAttention("p4", 2, 4, 3, 2, window=3)
    for size in ((5, 7), (7, 5), (1, 1), (2, 9)):
        images = torch.randn(1, 2, *size)
        assert lift(images).shape == (1, 3, 4, *size)
        turned = lift(images.rot90(1, (2, 3)))
        order = lift.group.permutation(lift.group.grid_elements[1])
        expected = lift(images).rot90(1, (3, 4))[:, :, order]
        torch.testing.assert_close(turned, expected, rtol=1e-4, atol=1e-5)
    whole = LiftingSelfAttention("p4", 2, 4, 3, 2, map_size=1)
    assert whole(torch.randn(1, 2, 1, 1)).isfinite().all()
    with pytest.raises(ValueError, match="built for maps of 1 x 1, not of 2 x 3"):
        whole(torch.randn(1, 2, 2, 3))


def test_probabilities_sum_to_one_and_lie_inside():
    layer = GroupSelfAttention("p4", 3, 5, 4, 2, window=3)
    found = layer.probabilities(torch.randn(1, 3, 4, 4, 4))
    torch.testing.assert_close(found.sum((-1, -2)), torch.ones(1, 2, 4, 4, 4, 4))
    corner = found[0, :, :, :, 0, 0].unflatten(-1, (3, 3))
    assert (corner[..., 0, :] == 0).all() and (corner[..., :, 0] == 0).all()


def test_probabilities_of_lifting_are_those_of_its_outputs():
    """One for each pixel, element and key position: there is no group axis yet."""
    layer = LiftingSelfAttention("p4m", 2, 4, 3, 2, window=3).double()
    images = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    found = layer.probabilities(images)
    assert found.shape == (2, 2, 8, 5, 6, 9)
    values = torch.nn.functional.pad(layer.value(images).unflatten(1, (4, 2)), (1,) * 4)
    windows = values.unfold(3, 3, 1).unfold(4, 3, 1).flatten(-2)  # [B c N H W J]
    y = torch.einsum("bnghwj,bcnhwj->bcnghw", found, windows)
    torch.testing.assert_close(layer(images), layer.wout(y.flatten(1, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Under autocast, and as the layer's own format: scores are softmaxed in float32."""
    layer = GroupSelfAttention("p4", 4, 6, 4, 2, window=3)
    x = torch.randn(2, 4, 4, 6, 6)
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    y.float().sum().backward()
    assert layer.query.weight.grad.isfinite().all()
    assert float(((y.float() - expected).abs().max() / expected.abs().max()).detach()) < 0.05
    assert layer.to(dtype)(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: LiftingSelfAttention("p4", 2, 5, 3, 2, window=3),
            "even number of channels.*not 5",
        ),
        (lambda: GroupSelfAttention("p4", 2, 2, 3, 2, window=3), "3 channels or more.*not 2"),
        (lambda: GroupSelfAttention("p4", 2, 6, 3, 2, window=4), "odd side.*4 is even"),
        (lambda: GroupSelfAttention("p4", 2, 6, 3, 2, window=-3), "positive odd side, not -3"),
        (lambda: GroupSelfAttention("p4", 2, 6, 3, 2), "needs a window, or map_size"),
        (lambda: GroupSelfAttention("q4", 2, 6, 3, 2, window=3), "group must be one of .*not 'q4'"),
    ],
)
def test_settings_that_cannot_be(make, said):
    with pytest.raises(ValueError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_scale_is_of_the_inputs():
    assert GroupSelfAttention("p4", 9, 6, 3, 2, window=3).scale == 1 / math.sqrt(9)
