"""Octic Vision Transformers: symmetry, options, resolutions, packing, compilation."""

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import octic  # noqa: F401  (registers the models)
from octic import OcticVisionTransformer
from octic.actions import act_on_tokens
from octic.groups import get_group
from octic.invariants import INVARIANTIZATIONS
from octic.vision_transformer import BASES
from vit.stochastic_depth import add_branch

GROUPS = ("mirror", "half_turn", "V4", "C4", "D4")
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2}

# Sheet of the published models: parameters with the frozen zero token parts, how many of them
# are frozen (ours does not store them), multiply-adds of one 224-pixel image in G.
PUBLISHED = {
    "hybrid_deit_huge_patch14": (355_778_760, 1120, 101.61),
    "hybrid_deit_large_patch16": (171_320_680, 896, 37.39),
    "d8_inv_early_deit_huge_patch14": (357_008_840, 1120, 101.92),
    "d8_inv_early_deit_large_patch16": (172_108_136, 896, 37.54),
    "hybrid_dinov2_vit_huge_patch16": (354_527_840, 2240, 76.96),
    "d8_inv_early_dinov2_vit_huge_patch16": (355_757_920, 2240, 77.20),
    "hybrid_dinov2_vit_large_patch16": (170_296_704, 1792, 37.39),
    "d8_inv_early_dinov2_vit_large_patch16": (171_084_160, 1792, 37.54),
    "dinov2_vit_huge_patch16": (631_001_600, 0, 127.31),
    "dinov2_vit_large_patch16": (303_351_808, 0, 61.55),
    "deit_huge_patch14_LS": (632_126_440, 0, 167.30),
    "deit_large_patch16_LS": (304_374_760, 0, 61.55),
}
POLYNOMIAL = {
    "d8_inv_early_deit_huge_patch14": (362_333_640, 1120, 103.29),
    "d8_inv_early_deit_large_patch16": (175_516_008, 896, 38.21),
}


def make(**options: object) -> nn.Module:
    """A small model in float64 with random parameters of noticeable size."""
    net = OcticVisionTransformer(**{**SMALL, "num_classes": 5, **options})
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.double().eval()


def images(height: int = 32, width: int = 32) -> Tensor:
    """Random images in float64."""
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("switch", (0, 1, 2))
def test_octic_half_is_equivariant(group: str, switch: int) -> None:
    """Tokens of every octic block move with the image, for every switch index."""
    symmetry = get_group(group)
    net = make(group=group, octic_equi_break_layer=switch, num_register_tokens=2)
    x = images()
    y = net.octic_features(x)
    for element in symmetry.elements:
        moved = net.octic_features(element.on_images(x))
        expected = act_on_tokens(y, element, symmetry, (8, 8), net.num_prefix_tokens)
        assert relative(moved, expected) <= 1e-12


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", [n for n in INVARIANTIZATIONS if n != "none"])
def test_invariant_models_are_invariant(group: str, name: str) -> None:
    """logits(g image) = logits(image) in the group, and not outside it."""
    if name in ("third_order", "polynomial") and group != "D4":
        pytest.skip("these polynomials are defined for D4")
    net, x = make(group=group, invariant=name, octic_equi_break_layer=1), images()
    y = net(x)
    inside = get_group(group).elements
    for element in get_group("D4").elements:
        error = relative(net(element.on_images(x)), y)
        assert error <= 1e-12 if element in inside else error > 1e-6
    assert relative(net(x.flip(1)), y) > 1e-6


@pytest.mark.parametrize("pool", ("token", "avg"))
def test_fully_equivariant_model_is_invariant_at_any_resolution(pool: str) -> None:
    """All blocks octic, invariant at the end; square, larger and oblong images."""
    net = make(
        invariant=True, octic_equi_break_layer=2, class_token=pool == "token", global_pool=pool
    )
    for size in ((32, 32), (48, 48), (32, 64), (16, 16), (24, 40), (16, 64)):
        x = images(*size)
        for element in get_group("D4").elements:
            assert relative(net(element.on_images(x)), net(x)) <= 1e-12


def test_hybrid_changes_under_the_group() -> None:
    """A hybrid is not invariant: its plain half sees the orientation."""
    net, x = make(), images()
    assert relative(net(x.flip(-1)), net(x)) > 1e-3


@pytest.mark.parametrize("basis", ("isotypic", "regular"))
def test_switch_basis_is_orthogonal(basis: str) -> None:
    """Either basis keeps the norm of a token."""
    net = make(switch_basis=basis)
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    torch.testing.assert_close(net.transition(x).norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("mode", ("sample", "subset"))
@pytest.mark.parametrize("rate", (0.0, 0.5))
def test_packed_crops_equal_looped_crops(mode: str, rate: float) -> None:
    """encode() of crops of three sizes equals one call for each, gradients included."""
    net = make(drop_path_rate=rate, drop_path_mode=mode, mask_token=True, num_register_tokens=1)
    crops = [images(), images(16, 16), images(16, 32)]
    masks = [torch.rand(2, 64) < 0.4, None, None]

    def run(packed: bool) -> tuple[list[Tensor], list[Tensor]]:
        net.zero_grad()
        if packed:
            out = net.encode(crops, masks)
        else:
            out = [net.encode([c], [m])[0] for c, m in zip(crops, masks, strict=True)]
        flat = [part for encoded in out for part in encoded]
        sum(part.square().mean() for part in flat).backward()
        return flat, [p.grad.clone() for p in net.parameters() if p.grad is not None]

    packed, looped = run(packed=True), run(packed=False)
    for a, b in zip(packed[0] + packed[1], looped[0] + looped[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ("sample", "subset"))
def test_stochastic_depth_keeps_the_mean_and_the_symmetry(mode: str) -> None:
    """The expected output is that of no dropping; a dropped octic block still commutes."""
    net = make(drop_path_rate=0.4, drop_path_mode=mode, depth=2, octic_equi_break_layer=2)
    block, symmetry = net.blocks[0].train(), get_group("D4")
    x = torch.randn(10, 4, 64, dtype=torch.float64)
    element = symmetry.element("mr")
    torch.manual_seed(0)
    y = block(x)
    torch.manual_seed(0)
    moved = block(act_on_tokens(x, element, symmetry, (2, 2)))
    assert relative(moved, act_on_tokens(y, element, symmetry, (2, 2))) <= 1e-12
    branch = torch.stack([block._mix_channels(x, None) for _ in range(2)])[0]
    drawn = [add_branch(x, block._mix_channels, None, rate=0.4, mode=mode) - x for _ in range(400)]
    # Each sample is kept with probability 0.6: the mean over 400 draws has deviation 0.041.
    ratio = torch.stack(drawn).mean(0).norm() / branch.norm()
    assert abs(ratio.item() - 1.0) < 0.05


@pytest.mark.parametrize("mode", ("sample", "subset"))
def test_a_sum_left_to_the_next_block_is_the_same_sum(mode: str) -> None:
    """Handing the last branch on changes no value and no gradient; hooks see whole tokens."""
    net = make(drop_path_rate=0.3, drop_path_mode=mode, depth=4).train()
    x = images()
    assert net.blocks[0].defers_sum and not net.blocks[-1].defers_sum
    found, seen = [], []
    for watched in (False, True):
        handles = [b.register_forward_hook(lambda *a: seen.append(a[-1])) for b in net.blocks]
        if not watched:
            for handle in handles:
                handle.remove()
        net.zero_grad()
        torch.manual_seed(0)
        y = net(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(seen) == 4 and all(out.shape == seen[0].shape for out in seen)
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ("sample", "subset"))
def test_a_block_that_is_watched_before_it_runs_is_given_whole_tokens(mode: str) -> None:
    """Pre-hooks see what the block before has made, and change nothing."""
    net = make(depth=4, drop_path_rate=0.3, drop_path_mode=mode, octic_equi_break_layer=3).train()
    x, seen = images(), []
    torch.manual_seed(0)
    expected = net(x)
    torch.manual_seed(0)
    after_first = net.blocks[0](net.embed(x))
    net.blocks[1].register_forward_pre_hook(lambda block, inputs: seen.append(inputs))
    torch.manual_seed(0)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert all(part is None for part in seen[0][1:])
    torch.testing.assert_close(seen[0][0], after_first, rtol=1e-12, atol=1e-12)


def test_pruning_leaves_no_octic_blocks_that_are_not_there() -> None:
    """Also where all blocks were octic."""
    for options in ({}, {"octic_equi_break_layer": 4}, {"invariant_at": "head"}):
        net = make(depth=4, **options)
        (expected,) = net.forward_intermediates(images(), [1], intermediates_only=True)
        net.prune_intermediate_layers([1])
        assert net.switch == net.depth == 2
        net.octic_features(images())
        assert net.forward_intermediates(images(), [1])[1][0].shape == expected.shape


@pytest.mark.parametrize("sizes", ([0, 2], [0], [2, 0]))
def test_an_empty_batch_of_crops_is_encoded(sizes: list[int]) -> None:
    """Where branches are dropped by leaving sequences out."""
    net = make(drop_path_rate=0.5, drop_path_mode="subset").train()
    crops = [images(32 - 16 * i)[:size] for i, size in enumerate(sizes)]
    assert [len(part.cls) for part in net.encode(crops)] == sizes


def test_intermediate_layers_include_the_octic_blocks() -> None:
    """Every block can be asked for; an octic one is told as plain tokens."""
    net, x = make(depth=4), images()
    taken = net.features(x, layers=(0, 1, 2, -1))
    torch.testing.assert_close(taken[-1].cls, net.forward_features(x)[:, 0])
    expected = net.norm(net.transition(net.octic_features(x, 1)))
    torch.testing.assert_close(taken[0].cls, expected[:, 0])
    assert taken[1].patches.shape == (2, 8, 8, 64)
    grids = net.get_intermediate_layers(x, n=[0, 3], reshape=True, return_class_token=True)
    assert grids[0][0].shape == (2, 64, 8, 8)
    downwards = net.get_intermediate_layers(x, n=[3, 0], reshape=True)
    torch.testing.assert_close(downwards, tuple(patches for patches, _ in grids))


@pytest.mark.parametrize(
    "options",
    (
        {},
        pytest.param({"invariant": True}, marks=pytest.mark.slow),
        pytest.param({"octic_equi_break_layer": 2}, marks=pytest.mark.slow),
    ),
)
def test_compiles_without_graph_break(options: dict[str, object]) -> None:
    """torch.compile(fullgraph=True) of forward and backward equals eager."""
    net = OcticVisionTransformer(**{**SMALL, "num_classes": 5, **options})
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        *({"invariant": name} for name in INVARIANTIZATIONS),
        {"invariant": "max_filtering", "group": "C4"},
        {"invariant": "max_filtering", "invariant_at": "head"},
        *({"switch_basis": basis, "group": group} for basis in BASES for group in ("D4", "C4")),
        {"switch_basis": "regular", "group": "mirror"},
    ],
    ids=str,
)
def test_every_transition_is_in_one_graph(options: dict[str, str]) -> None:
    """Whatever stands between the halves, or before the head, breaks no graph."""
    net, x = make(depth=1, octic_equi_break_layer=1, **options), images()
    torch.compiler.reset()  # the nets of other tests count towards its limit
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_compiled_runs_our_operators(trained: bool) -> None:
    """And not their slow spelling in PyTorch's own, which torch.export needs (`octic.composed`)."""
    seen = set()

    def look(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    net = make(depth=1, octic_equi_break_layer=1)
    torch.compiler.reset()
    with torch.set_grad_enabled(trained):
        torch.compile(net, fullgraph=True, backend=look)(images())
    ours = {"autograd_function_apply"} if trained else {
        *("octic.irrep_linear.default", "octic.irrep_norm.default", "octic.regular_gelu.default"),
    }  # fmt: skip
    assert ours <= seen and not any("einsum" in name for name in seen)


@pytest.mark.slow
def test_packed_crops_compile_without_graph_break() -> None:
    """encode() with masks, registers and dropped branches is one graph, equal to eager."""
    net = OcticVisionTransformer(
        **{**SMALL, "num_classes": 0, "mask_token": True, "num_register_tokens": 1},
        drop_path_rate=0.3,
        drop_path_mode="subset",
    )
    crops = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
    masks = [torch.rand(4, 64) < 0.3, None]
    compiled = torch.compile(net.encode, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = net.encode(crops, masks)
    torch.manual_seed(0)
    for ours, eager in zip(compiled(crops, masks), expected, strict=True):
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_and_multiply_adds(name: str) -> None:
    """Parameters equal the sheet's exactly; multiply-adds to 0.1 %."""
    assert measured(name) == pytest_like(PUBLISHED[name])


@pytest.mark.parametrize("name", POLYNOMIAL)
def test_polynomial_models(name: str) -> None:
    """The invariantization of the published DeiT III checkpoints reproduces the printed figures."""
    assert measured(name, invariant="polynomial") == pytest_like(POLYNOMIAL[name])


def measured(name: str, **options: object) -> tuple[int, object]:
    """Parameters and multiply-adds in G of a registered model, on the meta device."""
    with torch.device("meta"):
        net = timm.create_model(name, **options)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, 224, 224))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() / 2e9


def pytest_like(row: tuple[int, int, float]) -> tuple[int, object]:
    """The sheet's row as what we measure: without frozen parts, MACs within 0.1 %."""
    parameters, frozen, macs = row
    return parameters - frozen, pytest.approx(macs, rel=1e-3)


def test_seed_example() -> None:
    """The example of the octic-vits README, with its two options."""
    with torch.device("meta"):
        net = OcticVisionTransformer(embed_dim=1280, depth=32, num_heads=16)
        assert net.switch == 16
        assert OcticVisionTransformer(invariant=True).invariant == "power_spectrum"
        assert OcticVisionTransformer(octic_equi_break_layer=3).switch == 3


def test_misspelt_and_impossible_options_are_refused() -> None:
    """Nothing vanishes in **kwargs; every refusal says what would do."""
    with pytest.raises(TypeError, match="inavriant"):
        OcticVisionTransformer(inavriant=True)
    with pytest.raises(ValueError, match="give octic_equi_break_layer"):
        OcticVisionTransformer(depth=3)
    with pytest.raises(ValueError, match="not in 0 .. depth"):
        OcticVisionTransformer(octic_equi_break_layer=13)
    for index in (-1, 1.5, "6", True):
        with pytest.raises(ValueError, match="octic_equi_break_layer must be a whole number"):
            OcticVisionTransformer(octic_equi_break_layer=index)
    with pytest.raises(ValueError, match="power_spectrum"):
        OcticVisionTransformer(invariant="fourier")
    net = make()
    with pytest.raises(ValueError, match="multiple of the patch size 4"):
        net(images(30, 32))
    with pytest.raises(ValueError, match="mask_token=True"):
        net.encode([images()], [torch.zeros(2, 64, dtype=torch.bool)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"invariant": "max_filtering"},
        {"invariant": "canonization"},
        {"switch_basis": "regular"},
    ],
    ids=str,
)
def test_a_net_that_was_built_without_memory_takes_weights_either_way(options):
    """Tables are in no file: they are made again where the weights come to lie."""
    options = {"num_classes": 3, "depth": 1, "octic_equi_break_layer": 1} | options
    net, images = make(**options).eval(), torch.randn(2, 3, 32, 32).double()
    with torch.device("meta"):
        empty, assigned = make(**options).eval(), make(**options).eval()
    empty.to_empty(device="cpu").load_state_dict(net.state_dict())
    assigned.load_state_dict(net.state_dict(), assign=True)
    for other in (empty, assigned):
        assert torch.equal(other(images), net(images))
        assert not any(buffer.is_meta for buffer in other.buffers())


@pytest.mark.parametrize("switch", (0, 1, 2))
def test_the_projection_of_invariants_learns_as_the_last_octic_block(switch: int) -> None:
    """Layer-wise learning rates; it comes before the first plain block."""
    net = make(invariant=True, octic_equi_break_layer=switch)
    depths = group_parameters(net, net.group_matcher(), reverse=True)
    last = max(0, switch - 1)
    assert (
        depths["invariant_proj.weight"]
        == depths[f"blocks.{last}.norm1.{'scaling.beta' if switch else 'bias'}"]
    )


def test_a_hybrid_hands_on_the_copies_of_an_irrep_one_after_the_other() -> None:
    """As octic-vits: rows of the left copy of E, then of the right; ours store rows first."""
    x = torch.arange(64.0).expand(1, 1, -1)
    expected = [x[..., 8 * i : 8 * i + 8] for i in (0, 1, 2, 3, 4, 6, 5, 7)]
    assert torch.equal(make().transition(x), torch.cat(expected, dim=-1))
