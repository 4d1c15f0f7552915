"""Every layer commutes with the mirror, and half filters are what they say."""

import pytest
import torch

from baselines.flopping.activation import ACTIVATIONS, RegularActivation
from baselines.flopping.convnext import MirrorConvNeXtBlock
from baselines.flopping.filters import (
    HalfFilter,
    MeanDownsample,
    MirrorDepthwiseConv,
    MirrorDownsample,
    MirrorLift,
)
from baselines.flopping.resmlp import (
    MirrorResMlpBlock,
    PairLinear,
    PairMlp,
    PairScale,
    TokenLinear,
    from_pairs,
    to_pairs,
)
from tests.baselines.flopping.cases import mirrored, mirrored_pairs, random, relative, shaken

MAP_LAYERS = {
    "depthwise": lambda: MirrorDepthwiseConv(16),
    "depthwise_3": lambda: MirrorDepthwiseConv(16, kernel_size=3),
    "depthwise_symmetric": lambda: MirrorDepthwiseConv(16, mixing="symmetric"),
    "downsample": lambda: MirrorDownsample(16, 24),
    "downsample_mean": lambda: MeanDownsample(16, 24),
    **{
        f"block_{kind}": lambda kind=kind: MirrorConvNeXtBlock(16, activation=kind)
        for kind in ACTIVATIONS
    },
    "block_no_scale": lambda: MirrorConvNeXtBlock(16, init_values=None),
    "block_symmetric": lambda: MirrorConvNeXtBlock(16, depthwise="symmetric"),
}
PAIR_LAYERS = {
    "scale": lambda: PairScale(16),
    "scale_bias": lambda: PairScale(16, bias=True),
    "linear": lambda: PairLinear(16, 24),
    "linear_no_bias": lambda: PairLinear(16, 24, bias=False),
    "tokens": lambda: TokenLinear(6),
    "tokens_no_bias": lambda: TokenLinear(6, bias=False),
    **{f"mlp_{kind}": lambda kind=kind: PairMlp(16, 32, activation=kind) for kind in ACTIVATIONS},
    "block": lambda: MirrorResMlpBlock(16, 12),
    "block_no_bias": lambda: MirrorResMlpBlock(16, 12, affine_bias=False),
}


@pytest.mark.parametrize("name", MAP_LAYERS)
def test_layers_on_maps_are_equivariant(name: str) -> None:
    """layer(g x) = g layer(x), and layer(x) is not g layer(x)."""
    layer, x = shaken(MAP_LAYERS[name]()), random(2, 6, 8, 16)
    y = layer(x)
    assert relative(layer(mirrored(x)), mirrored(y)) <= 1e-13
    assert relative(layer(x), mirrored(y)) > 0.1


@pytest.mark.parametrize("name", PAIR_LAYERS)
def test_layers_on_pairs_are_equivariant(name: str) -> None:
    """layer(g x) = g layer(x), and layer(x) is not g layer(x)."""
    layer, x = shaken(PAIR_LAYERS[name]()), random(2, 6, 2, 16)
    y = layer(x)
    assert relative(layer(mirrored_pairs(x)), mirrored_pairs(y)) <= 1e-13
    assert relative(layer(x), mirrored_pairs(y)) > 0.1


def test_lift_and_pairs_are_equivariant() -> None:
    """A mirrored image gives mirrored features; pairs are an orthogonal change of basis."""
    lift, images = shaken(MirrorLift(3, 16, 4)), random(2, 3, 16, 24)
    grid = lift(images)
    assert relative(lift(images.flip(-1)), mirrored(grid)) <= 1e-13
    pairs = to_pairs(grid, 0.5**0.5)
    assert relative(to_pairs(mirrored(grid), 0.5**0.5), mirrored_pairs(pairs)) <= 1e-13
    assert relative(from_pairs(pairs, (4, 6)), grid) <= 1e-13


@pytest.mark.parametrize("num_signs", (1, 2))
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_act_on_regular_components(kind: str, num_signs: int) -> None:
    """H act(H x) with H orthogonal and its own inverse, also in half precision."""
    layer, x = RegularActivation(kind, num_signs=num_signs), random(3, 16)
    matrix = torch.tensor(layer.transform, dtype=x.dtype)
    assert relative(matrix @ matrix, torch.eye(len(matrix), dtype=x.dtype)) <= 1e-15
    parts = x.unflatten(-1, (len(matrix), -1))
    expected = (matrix @ ACTIVATIONS[kind](matrix @ parts)).flatten(-2)
    assert relative(layer(x), expected) <= 1e-14
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half, expected) <= 1e-2


def test_invariant_parts_alone_are_those_of_the_whole() -> None:
    """What a last block leaves out changes nothing of what is read, nor any gradient."""
    block, x = shaken(MirrorResMlpBlock(16, 12)), random(2, 6, 2, 16)
    parts = block(x).unflatten(-1, (2, -1))
    read = torch.stack([parts[..., 0, 0, :], parts[..., 1, 1, :]], dim=-2)
    assert relative(block(x, invariants_only=True), read) <= 1e-13
    for scale in (1e-6, None):
        conv, x = shaken(MirrorConvNeXtBlock(16, init_values=scale)), random(2, 6, 8, 16)
        gradients = []
        for even in (conv(x)[..., :8], conv(x, even_only=True)):
            loss = even.square().sum()
            gradients.append(torch.autograd.grad(loss, list(conv.parameters())))
        for whole, alone in zip(*gradients, strict=True):
            assert (whole - alone).abs().max() <= 1e-12 * whole.abs().max().clamp_min(1)


@pytest.mark.parametrize("kind", (MirrorDownsample, MeanDownsample))
def test_a_column_too_many_is_dropped_where_that_is_allowed(kind: type) -> None:
    """And nothing else changes."""
    layer, x = shaken(kind(16, 24, allow_odd=True)), random(2, 4, 7, 16)
    assert relative(layer(x), layer(x[:, :, :6])) <= 1e-14


@pytest.mark.parametrize("width", (2, 3, 4, 7))
@pytest.mark.parametrize("symmetric", (True, False))
def test_half_filters(width: int, symmetric: bool) -> None:
    """The mirror keeps a symmetric filter and negates an antisymmetric one."""
    full = shaken(HalfFilter(4, 3, (5, width), symmetric=symmetric)).full()
    assert full.shape == (4, 3, 5, width) and full.abs().max() > 0
    assert torch.equal(full.flip(-1), full if symmetric else -full)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HalfFilter(4, 3, (5, 1), symmetric=False), "5 x 1 is zero"),
        (lambda: MirrorDepthwiseConv(18), "not a multiple of 4.*nearest: 1[6-9]|20"),
        (lambda: MirrorDepthwiseConv(16, kernel_size=4), "must be odd, not 4"),
        (
            lambda: MirrorDepthwiseConv(16, mixing="none"),
            "depthwise must be one of full",
        ),
        (lambda: MirrorDownsample(16, 24)(torch.zeros(1, 4, 5, 16)), "columns must be even"),
        (lambda: MirrorLift(3, 16, 5), "even number of columns"),
        (lambda: PairLinear(16, 8)(torch.zeros(1, 3, 2, 24)), "24 channels given to a .*ear of 16"),
        (lambda: TokenLinear(4)(torch.zeros(1, 5, 2, 16)), "5 pairs given to a TokenLinear of 4"),
        (lambda: PairScale(15), "not a multiple of 2"),
        (
            lambda: RegularActivation("relu"),
            "activation must be one of gelu, gelu_tanh",
        ),
    ],
)
def test_bad_settings_say_what_is_wrong(make, message: str) -> None:
    """One line that names the setting and what would be right."""
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
