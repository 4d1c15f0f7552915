"""Every layer commutes with every element of its group, in float64 to 1e-12."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from octic.actions import ToRegular, act, act_on_tokens
from octic.attention import OcticAttention
from octic.block import OcticBlock
from octic.groups import Group, get_group
from octic.invariants import (
    INVARIANTIZATIONS,
    Canonization,
    MaxFiltering,
    detect_invariantization,
    invariantizations_of_width,
    make_invariantization,
)
from octic.layers import (
    OcticGELU,
    OcticLayerNorm,
    OcticLinear,
    OcticMlp,
    OcticScale,
)
from octic.patch_embed import OcticPatchEmbed, OcticToPatch
from vit.block import terms_of

GROUPS = ("mirror", "half_turn", "V4", "C4", "D4")
DIM = 32
TOLERANCE = 1e-12

LAYERS: dict[str, Callable[[Group], nn.Module]] = {
    "linear": lambda g: OcticLinear(DIM, 2 * DIM, group=g),
    "scale": lambda g: OcticScale(DIM, bias=True, group=g),
    "norm": lambda g: OcticLayerNorm(DIM, group=g),
    "natural norm": lambda g: OcticLayerNorm(
        DIM, irrep_weights={i.name: float(i.dim * i.copies) for i in g.irreps}, group=g
    ),
    "gelu": lambda g: OcticGELU(group=g),
    "mlp": lambda g: OcticMlp(DIM, 2 * DIM, norm=True, group=g),
    "attention": lambda g: OcticAttention(DIM, num_heads=2, group=g),
    "block": lambda g: OcticBlock(DIM, num_heads=4, init_values=0.1, group=g),
}


def randomised(module: nn.Module) -> nn.Module:
    """Random parameters: no zero and no identity is left to hide a mistake."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def features(tokens: int = 5) -> Tensor:
    """Random features with a mean, so that its removal is exercised."""
    return torch.randn(2, tokens, DIM, dtype=torch.float64) + torch.randn(1, 1, DIM).double()


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_equivariant(name: str, group: str) -> None:
    """layer(g x) = g layer(x), and not so for a random orthogonal mixing of channels."""
    symmetry = get_group(group)
    layer, x = randomised(LAYERS[name](symmetry)), features()
    y = layer(x)
    for element in symmetry.elements:
        assert relative(layer(act(x, element, symmetry)), act(y, element, symmetry)) <= TOLERANCE


@pytest.mark.parametrize("group", GROUPS)
def test_lift_is_equivariant_and_breaks_outside_the_group(group: str) -> None:
    """Moving the image moves the tokens over the grid and their channels."""
    symmetry = get_group(group)
    lift = randomised(OcticPatchEmbed(patch_size=4, embed_dim=DIM, group=symmetry))
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    y = lift(images).flatten(1, 2)
    for element in symmetry.elements:
        moved = lift(element.on_images(images)).flatten(1, 2)
        assert relative(moved, act_on_tokens(y, element, symmetry, (6, 6))) <= TOLERANCE
    for element in set(get_group("D4").elements) - set(symmetry.elements):
        moved = lift(element.on_images(images)).flatten(1, 2)
        # The trivial irrep would be the plain turned map, were the filters that symmetric.
        turned = element.on_images(y.unflatten(1, (6, 6)).movedim(-1, 1)).movedim(1, -1)
        copy = DIM // symmetry.order
        assert relative(moved[..., :copy], turned.flatten(1, 2)[..., :copy]) > 1e-3


@pytest.mark.parametrize("group", GROUPS)
def test_to_patch_is_equivariant(group: str) -> None:
    """Pixels made of moved tokens are the moved pixels."""
    symmetry = get_group(group)
    layer = randomised(OcticToPatch(DIM, 4, group=symmetry))
    x = features(tokens=9)
    image = layer.image(x, (3, 3))
    for element in symmetry.elements:
        moved = layer.image(act_on_tokens(x, element, symmetry, (3, 3)), (3, 3))
        assert relative(moved, element.on_images(image)) <= TOLERANCE


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", INVARIANTIZATIONS)
def test_invariantizations(name: str, group: str) -> None:
    """f(g x) = f(x), except for the control; the result does depend on x."""
    symmetry = get_group(group)
    if name in ("third_order", "polynomial") and group != "D4":
        with pytest.raises(ValueError, match="defined for D4"):
            make_invariantization(name, DIM, symmetry)
        return
    layer, x = make_invariantization(name, DIM, symmetry).double(), features()
    y = layer(x)
    assert y.shape == (2, 5, layer.output_dim)
    errors = [relative(layer(act(x, g, symmetry)), y) for g in symmetry.elements]
    if name == "none" and symmetry.planes:
        assert max(errors) > 1e-3
    else:
        assert max(errors) <= TOLERANCE
    assert relative(layer(x + 0.1 * features()), y) > 1e-3


def test_a_width_tells_the_invariantization() -> None:
    """Of D4 in the published numbers of polynomials; of any group by its own."""
    published = {
        **{1: ["linear", "trivial"], 6: ["power_spectrum"], 8: ["none"], 15: ["third_order"]},
        **{32: ["polynomial"], 7: []},
    }
    for copies, names in published.items():
        assert invariantizations_of_width(copies * DIM // 8, DIM) == names
    assert invariantizations_of_width(DIM // 8 + 1, DIM) == []
    assert invariantizations_of_width(3 * DIM // 4, DIM, "C4") == ["power_spectrum"]
    assert invariantizations_of_width(DIM, DIM, "mirror") == ["power_spectrum", "none"]
    state = {"invariant_proj.weight": torch.zeros(DIM, DIM)}
    for own, found in (("none", "none"), ("linear", "power_spectrum"), ("", "power_spectrum")):
        assert detect_invariantization(state, DIM, group="mirror", own=own) == found


@pytest.mark.parametrize("name", INVARIANTIZATIONS)
def test_invariants_of_zero_have_finite_gradients(name: str) -> None:
    """A class token has no channels but the trivial irrep's until a block has mixed them."""
    x = torch.zeros(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    make_invariantization(name, DIM).double()(x).sum().backward()
    assert x.grad.isfinite().all()


def test_octic_linear_costs_a_fifth() -> None:
    """Parameters in*out/8 + out/8; multiply-adds 3/16 of the dense layer's."""
    from torch.utils.flop_counter import FlopCounterMode

    layer = OcticLinear(64, 128)
    assert sum(p.numel() for p in layer.parameters()) == 64 * 128 // 8 + 128 // 8
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(10, 64))
    assert counter.get_total_flops() == 2 * 10 * 64 * 128 * 3 // 16


def test_norm_of_unit_variance_has_variance_8_5() -> None:
    """The published weight of E is 1, not 4; the natural weight gives variance 1."""
    x = torch.randn(4000, 256, dtype=torch.float64)
    assert abs(OcticLayerNorm(256).double()(x).var().item() - 1.6) < 0.02
    natural = OcticLayerNorm(256, irrep_weights={"E": 4.0}).double()
    assert abs(natural(x).var().item() - 1.0) < 0.02


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_of_irreps_are_positive_and_finite(weight: float) -> None:
    """The norm divides by their roots, and an infinite one would make every feature NaN."""
    with pytest.raises(ValueError, match="the weight of E is"):
        OcticLayerNorm(64, irrep_weights={"E": weight})


def test_bad_widths_are_refused() -> None:
    """Errors name the nearest width, the heads, the patch."""
    with pytest.raises(ValueError, match="nearest: 64"):
        OcticLinear(60, 64)
    with pytest.raises(
        ValueError, match="num_heads 3 does not divide 8, .*; possible: 1, 2, 4, 8$"
    ):
        OcticAttention(64, num_heads=3)
    for heads in (0, 2.0, "2"):
        with pytest.raises(ValueError, match="num_heads must be a whole number of at least 1, not"):
            OcticAttention(64, num_heads=heads)
    for widths in ((0, None), (None, 0)):
        with pytest.raises(ValueError, match="width 0 is not a multiple of 8"):
            OcticMlp(64, *widths)
    with pytest.raises(ValueError, match="width 0 is not a multiple of 8"):
        OcticBlock(64, mlp_ratio=0)
    with pytest.raises(ValueError, match="even number"):
        OcticPatchEmbed(patch_size=7, embed_dim=64)
    with pytest.raises(ValueError, match="patch_size 2"):
        OcticPatchEmbed(patch_size=2, embed_dim=64)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and blocks hand on biases and matrices as where Triton is; operators do not."""
    for module in ("octic.layers", "octic.block"):
        monkeypatch.setattr(f"{module}.takes_triton", lambda x: True)


def values_and_gradients(net: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    y = net(x)
    return [y, *torch.autograd.grad(y, [x, *net.parameters()], grad)]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["mlp", "attention", "block"])
def test_what_a_gpu_hands_on_changes_nothing(name, group, monkeypatch):
    """Biases that the next kernel adds, matrices made at once: the same values and gradients."""
    layer, x, grad = randomised(LAYERS[name](get_group(group))), features(), features()
    apart = values_and_gradients(layer, x, grad)
    as_on_a_gpu(monkeypatch)
    for ours, reference in zip(values_and_gradients(layer, x, grad), apart, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_hooks_see_whole_results_where_biases_are_handed_on(monkeypatch):
    block, x = randomised(LAYERS["block"](get_group("D4"))), features()
    plain = block(x)
    as_on_a_gpu(monkeypatch)
    watched = {
        name: module for name, module in block.named_modules() if isinstance(module, OcticLinear)
    } | {"attn": block.attn, "mlp": block.mlp}
    seen = {}
    for name, module in watched.items():
        module.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
    torch.testing.assert_close(block(x), plain, rtol=1e-12, atol=1e-12)
    assert seen.keys() == watched.keys()
    block.mlp.act.register_forward_pre_hook(lambda m, inputs: seen.update(act=inputs))
    torch.testing.assert_close(block(x), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen["act"], (seen["mlp.fc1"],), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen["attn"], seen["attn.proj"], rtol=1e-12, atol=1e-12)
    hidden = block.norm2(x + seen["attn"])
    torch.testing.assert_close(seen["mlp.fc1"], block.mlp.fc1(hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gpu", [False, True])
def test_other_norms_and_activations_need_nothing_but_a_forward_of_features(gpu, monkeypatch):
    """In place of ours, which also take sums and biases that are handed on."""

    class Other(nn.Module):
        def __init__(self, ours):
            super().__init__()
            self.ours = ours

        def forward(self, x):
            return self.ours(x)

    block, x, grad = randomised(LAYERS["block"](get_group("D4"))), features(), features()
    reference = values_and_gradients(block, x, grad)
    if gpu:
        as_on_a_gpu(monkeypatch)
    block.norm1, block.norm2 = Other(block.norm1), Other(block.norm2)
    block.mlp.act = Other(block.mlp.act)
    for ours, theirs in zip(values_and_gradients(block, x, grad), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gpu", [False, True])
def test_hooks_on_norms_and_scales_fire_once_in_each_block(gpu, monkeypatch):
    """Norms that take a sum along, and scales that go into matrices, do not where they are seen."""
    if gpu:
        as_on_a_gpu(monkeypatch)
    blocks = randomised(nn.ModuleList(LAYERS["block"](get_group("D4")) for _ in range(2)))

    def run(x):
        addend = None
        for block in blocks:
            x, addend = terms_of(block(x, None, addend, True))
        return addend.to(x)

    x, seen = features(), []
    plain = run(x)
    for block in blocks:
        for name in ("norm1", "ls1", "norm2", "ls2"):
            hook = lambda m, inputs, y, name=name: seen.append((name, inputs[0], y))  # noqa: E731
            getattr(block, name).register_forward_hook(hook)
    torch.testing.assert_close(run(x), plain, rtol=1e-12, atol=1e-12)
    assert [name for name, _, _ in seen] == ["norm1", "ls1", "norm2", "ls2"] * 2
    torch.testing.assert_close(seen[2][1], x + seen[1][2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[4][1], seen[2][1] + seen[3][2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_gradients_fire_where_biases_are_handed_on(kind, monkeypatch):
    """As where they are not: what is fused is not fused where somebody looks."""
    as_on_a_gpu(monkeypatch)
    names = ["norm1", "attn", "attn.qkv", "ls1", "norm2", "mlp", "mlp.fc1", "mlp.act", "ls2"]
    for name in names:
        block, seen = randomised(LAYERS["block"](get_group("D4"))), []
        getattr(block.get_submodule(name), kind)(lambda *_, seen=seen: seen.append(True))
        block(features().requires_grad_()).square().sum().backward()
        assert seen == [True], name


def test_features_of_another_width_are_refused():
    """Not read by strides as if they had the layer's own."""
    layer = OcticLinear(32, 64)
    for call in (layer, layer.without_bias):
        with pytest.raises(ValueError, match="of 40 channels given to an OcticLinear of 32"):
            call(torch.randn(2, 40))


@pytest.mark.parametrize("layer", [MaxFiltering(DIM), Canonization(DIM), ToRegular(get_group())])
def test_tables_of_a_basis_stay_exact_under_a_cast(layer):
    """A net that was in half precision in between is the net that it was."""
    net, x = layer.double(), torch.randn(3, DIM, dtype=torch.float64)
    for parameter in net.parameters():
        parameter.data = parameter.half().double()
    expected = net(x)
    assert torch.equal(net.half().double()(x), expected)
    assert not any("actions" in name or "transform" in name for name in net.state_dict())


def test_tables_of_filters_stay_whole_numbers_under_a_cast():
    net, images = OcticPatchEmbed(patch_size=4, embed_dim=DIM), torch.randn(2, 3, 8, 8)
    expected = net(images)
    cast = net.type(torch.float64)
    torch.testing.assert_close(cast(images.double()).float(), expected)
    assert {buffer.dtype for buffer in cast.buffers()} == {torch.int8, torch.int64}


@pytest.mark.parametrize("mode", ["sample", "subset"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_net_hands_on_from_block_to_block(rate, mode, monkeypatch):
    """Layer scales, dropped branches, tapped blocks and the last block of all."""
    blocks = [
        OcticBlock(DIM, num_heads=4, init_values=0.1, drop_path_rate=rate, drop_path_mode=mode)
        for _ in range(3)
    ]
    chain = randomised(nn.ModuleList(blocks)).train()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = chain

        def forward(self, x):
            torch.manual_seed(0)
            addend = None
            for block in self.blocks:
                x, addend = terms_of(block(x, None, addend, True))
            return x if addend is None else addend.to(x)

    net, x, grad = Net(), features(), features()
    apart = values_and_gradients(net, x, grad)
    as_on_a_gpu(monkeypatch)
    for ours, reference in zip(values_and_gradients(net, x, grad), apart, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["D4", "C4", "V4", "mirror"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_scale_in_the_weights_is_a_scale_of_the_result(name, dtype):
    layer = OcticLinear(32, 64, group=name).to(dtype)
    scale = OcticScale(64, 1e-5, group=name).to(dtype)
    for parameter in scale.parameters():
        parameter.data *= 1 + torch.rand_like(parameter)
    x = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
    inputs = [x, *layer.parameters(), *scale.parameters()]
    grad = torch.randn(2, 5, 64, dtype=dtype)
    folded, apart = layer(x, scale), scale(layer(x))
    pairs = zip(
        [folded, *torch.autograd.grad(folded, inputs, grad)],
        [apart, *torch.autograd.grad(apart, inputs, grad)],
        strict=True,
    )
    for ours, reference in pairs:
        # In float16 the two are the same computation: small weights would vanish.
        tolerance = 0.0 if dtype == torch.float16 else 1e-14
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_a_small_scale_survives_autocast_to_float16():
    """There too it is kept out of the weights, some of which it would make zero."""
    layer, scale, x = OcticLinear(32, 64), OcticScale(64, 1e-7), torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(layer(x, scale), scale(layer(x)))
    torch.testing.assert_close(layer(x, scale), scale(layer(x)), rtol=1e-5, atol=1e-12)


def test_max_filtering_has_an_invariant_for_each_reference() -> None:
    """As many as are asked for, and 2 D where nobody asks."""
    x = torch.randn(3, 32)
    for count, width in ((None, 64), (5, 5)):
        layer = MaxFiltering(32, num_references=count)
        assert layer(x).shape == (3, width) and layer.output_dim == width
    with pytest.raises(ValueError, match="num_references must be 1 or more, not 0"):
        MaxFiltering(32, num_references=0)
