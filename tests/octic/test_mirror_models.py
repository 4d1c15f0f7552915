"""Mirror-equivariant ViTs: symmetry in float64, published counts, options and their errors."""

import pytest
import timm
import torch
from torch import Tensor, nn

import octic
from octic import OcticVisionTransformer
from octic.actions import act, act_on_tokens
from octic.attention import OcticAttention
from octic.debug_models import HalvesAttentionViT, HalvesViT
from octic.groups import get_group
from octic.mirror_models import EQUIVARIANT, HYBRID, INVARIANT
from octic.patch_embed import OcticLift
from utils.flops import multiply_adds
from vit.models import DEIT

MIRROR = get_group("mirror")
FLIP = MIRROR.element("m")
SMALL = {
    **{"img_size": (24, 32), "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4},
    "num_classes": 5,
}
PRESETS = {
    "d2": EQUIVARIANT,
    "d2 with |x-|": {**EQUIVARIANT, "invariant": "power_spectrum"},
    "d2 with mixer": {**EQUIVARIANT, "attention_mixer": True},
    "d2, mean patch": {**EQUIVARIANT, "class_token": False, "global_pool": "avg"},
    "hybrid": HYBRID,
    "hybrid with mixer": {**HYBRID, "attention_mixer": True},
    "d2_inv_early": INVARIANT,
    "d2_inv_early, projected": {**INVARIANT, "invariant_proj": True},
}
INVARIANT_PRESETS = [name for name in PRESETS if not name.startswith("hybrid")]

# Flopping for FLOPs at 224 x 224: parameters, how many of them are frozen zeros (half a class
# token) or integer indices (one per patch), multiply-adds in G with 5 per element of a LayerNorm.
PUBLISHED = {
    "deit_tiny_patch16_LS": (5_721_832, 0, 1.258),
    "deit_small_patch16_LS": (22_059_496, 0, 4.608),
    "deit_medium_patch16_LS": (38_849_512, 0, 8.004),
    "deit_base_patch16_LS": (86_585_320, 0, 17.583),
    "deit_large_patch16_LS": (304_374_760, 0, 61.604),
    "deit_huge_patch14_LS": (632_126_440, 0, 167.402),
    "deit_huge_patch14_52_LS": (1_025_726_440, 0, 271.906),
    "d2_deit_tiny_patch16_LS": (2_866_412, 96 + 196, 0.731),
    "d2_deit_small_patch16_LS": (11_040_044, 192 + 196, 2.507),
    "d2_deit_medium_patch16_LS": (19_438_252, 256 + 196, 4.272),
    "d2_deit_base_patch16_LS": (43_312_556, 384 + 196, 9.197),
    "d2_deit_large_patch16_LS": (152_238_252, 512 + 196, 31.808),
    "d2_deit_huge_patch14_LS": (316_147_176, 640 + 256, 86.449),
    "d2_deit_huge_patch14_52_LS": (512_998_376, 640 + 256, 140.359),
    "hybrid_deit_tiny_patch16_LS": (4_295_948, 96 + 196, 0.995),
    "hybrid_deit_small_patch16_LS": (16_553_324, 192 + 196, 3.558),
    "hybrid_deit_medium_patch16_LS": (29_148_588, 256 + 196, 6.138),
    "hybrid_deit_base_patch16_LS": (64_955_948, 384 + 196, 13.391),
    "hybrid_deit_large_patch16_LS": (228_315_820, 512 + 196, 46.707),
    "hybrid_deit_huge_patch14_LS": (474_186_856, 640 + 256, 126.927),
    "hybrid_deit_huge_patch14_52_LS": (769_412_456, 640 + 256, 206.134),
    "debug_hybrid_deit_tiny_patch16_LS": (4_832_488, 0, 1.084),
    "debug_ultra_hybrid_deit_tiny_patch16_LS": (3_054_856, 0, 0.731),
}
PUBLISHED |= {
    name.replace("hybrid", "d2_inv_early"): row
    for name, row in PUBLISHED.items()
    if name.startswith("hybrid")
}
LONG = ("large", "huge")


def shaken(net: nn.Module) -> nn.Module:
    """Random parameters of noticeable size, in float64."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.double().eval()


def make(name: str, **options: object) -> nn.Module:
    return shaken(OcticVisionTransformer(**{**PRESETS[name], **SMALL, **options}))


def images(height: int = 24, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("name", INVARIANT_PRESETS)
def test_logits_are_invariant_to_the_mirror_alone(name: str) -> None:
    """f(m x) = f(x) on oblong grids and at other sizes; not so for turns and up-down mirrorings."""
    net = make(name)
    for size in ((24, 32), (32, 48), (20, 16)):
        x = images(*size)
        assert relative(net(x.flip(-1)), net(x)) <= 1e-12
    x = images(32, 32)
    for moved in (x.flip(-2), x.rot90(1, (-2, -1)), x.rot90(2, (-2, -1)), x.flip(1)):
        assert relative(net(moved), net(x)) > 1e-6


@pytest.mark.parametrize("name", PRESETS)
def test_tokens_of_equivariant_blocks_move_with_the_image(name: str) -> None:
    """Tokens of every octic block: x+ stays, x- changes its sign, columns are mirrored."""
    net, x = make(name), images()
    for blocks in range(net.switch + 1):
        moved = net.octic_features(x.flip(-1), blocks)
        expected = act_on_tokens(
            net.octic_features(x, blocks), FLIP, MIRROR, (6, 8), net.num_prefix_tokens
        )
        assert relative(moved, expected) <= 1e-12
    assert net.switch == (4 if name.startswith("d2") and "early" not in name else 2)


def test_a_hybrid_is_not_invariant() -> None:
    """Its plain half sees left and right."""
    net, x = make("hybrid"), images()
    assert relative(net(x.flip(-1)), net(x)) > 1e-3


@pytest.mark.parametrize("name", INVARIANT_PRESETS)
def test_probes_read_invariants(name: str) -> None:
    """Class token invariant, the map of patches mirrored, `embed_dim` channels wide."""
    net, x = make(name), images()
    for still, moved in zip(
        net.features(x, (1, -1)), net.features(x.flip(-1), (1, -1)), strict=True
    ):
        assert relative(moved.cls, still.cls) <= 1e-12
        assert relative(moved.patches, still.patches.flip(2)) <= 1e-12
        assert still.cls.shape == (2, net.embed_dim)
    wide = name.startswith("d2_inv") or name == "d2 with |x-|"
    assert net.embed_dim == net.num_features == net.head_hidden_size == (32 if wide else 16)


@pytest.mark.parametrize("group", ("mirror", "V4", "C4", "D4"))
@pytest.mark.parametrize("options", ({"mixer": True}, {"qk_scale": 0.3}))
def test_attention_with_other_logits_is_equivariant(group: str, options: dict[str, float]) -> None:
    """A mixer and a scale of one's own leave the logits invariant, for every group."""
    symmetry = get_group(group)
    layer = shaken(OcticAttention(32, num_heads=2, group=symmetry, **options))
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    plain = OcticAttention(32, num_heads=2, group=symmetry).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert relative(layer(x), plain(x)) > 1e-3
    for element in symmetry.elements:
        moved = layer(act(x, element, symmetry))
        assert relative(moved, act(layer(x), element, symmetry)) <= 1e-12


def test_mixer_starts_at_the_trivial_irrep() -> None:
    """Published start (1, 0); with (1, 1) it is ordinary attention."""
    layer = OcticAttention(32, num_heads=2, mixer=True, group=MIRROR)
    assert layer.attn_mixer.tolist() == [1.0, 0.0]
    nn.init.ones_(layer.attn_mixer)
    plain = OcticAttention(32, num_heads=2, group=MIRROR)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(x), plain(x))


def test_scaled_bias_is_the_bias_times_the_filters_factor() -> None:
    """Flopping for FLOPs scales the sum of convolution and bias; patches may be oblong."""
    scaled = shaken(OcticLift(3, 8, (4, 6), scaled_bias=True, group=MIRROR))
    plain = OcticLift(3, 8, (4, 6), group=MIRROR).double()
    plain.load_state_dict(scaled.state_dict())
    plain.conv_A1.bias.data *= 0.5**0.5
    x = images(8, 12)
    assert relative(scaled(x), plain(x)) <= 1e-15


@pytest.mark.parametrize("family", ("d2", "hybrid", "d2_inv_early"))
def test_registered_nets_have_the_options_of_the_published_ones(family: str) -> None:
    """The patches' bias takes the filters' factor; a hybrid's plain half sees sums, differences."""
    net = timm.create_model(f"{family}_deit_small_patch16_LS", depth=2).double()
    grey = net.patch_embed(torch.zeros(1, 3, 32, 32).double())[0, 0, 0]
    torch.testing.assert_close(grey[:192], net.patch_embed.lift8.conv_A1.bias * 0.5**0.5)
    if family == "hybrid":
        x = torch.randn(2, 5, 384, dtype=torch.float64)
        still, signed = x.chunk(2, dim=-1)
        both = torch.cat([still + signed, still - signed], dim=-1) * 0.5**0.5
        torch.testing.assert_close(net.transition(x), both)


@pytest.mark.parametrize("net", (HalvesAttentionViT, HalvesViT))
def test_debug_nets_claim_nothing(net: type[nn.Module]) -> None:
    """Their halves come from a plain patch embedding: no symmetry."""
    model, x = shaken(net(**{**DEIT, **SMALL})), images()
    assert relative(model(x.flip(-1)), model(x)) > 1e-3


def test_a_block_of_halves_takes_every_option_of_the_plain_one() -> None:
    """Its attention is built from them once."""
    block = HalvesAttentionViT.block_class(32, num_heads=4, qk_scale=7.0, qkv_bias=False)
    assert isinstance(block.attn, OcticAttention) and block.attn.group is MIRROR
    assert block.attn.qk_scale == 7.0
    assert not any(name.endswith("qkv.bias") for name, _ in block.named_parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name: str) -> None:
    """Published counts less frozen zeros and indices, exactly; no integer in the state dict."""
    parameters, idle, _ = PUBLISHED[name]
    with torch.device("meta"):
        net = timm.create_model(name)
    assert sum(p.numel() for p in net.parameters()) == parameters - idle
    assert all(tensor.is_floating_point() for tensor in net.state_dict().values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if any(s in name for s in LONG) else ())
        for name in PUBLISHED
    ],
)
def test_published_multiply_adds(name: str) -> None:
    """To the third decimal of a G, with fvcore's 5 per element of plain LayerNorms as published."""
    with torch.device("meta"):
        net = timm.create_model(name)
    tokens = 1 + net.grid_size[0] * net.grid_size[1]
    norms = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.LayerNorm))
    counted = multiply_adds(net, 224) + 5 * tokens * norms
    assert counted / 1e9 == pytest.approx(PUBLISHED[name][2], abs=6e-4)


def test_every_published_net_is_registered() -> None:
    """21 mirror nets and two for debugging; none takes the name of an octic net."""
    names = {*octic.mirror_models.default_cfgs, *octic.debug_models.default_cfgs}
    assert len(names) == 23 and names <= PUBLISHED.keys()
    assert not names & octic.models.default_cfgs.keys()


@pytest.mark.parametrize("name", ("d2", "hybrid", "d2_inv_early"))
def test_trains_with_dropout(name: str) -> None:
    """Head dropout and drop path; every parameter has a gradient, tokens and positions no decay."""
    options = {**PRESETS[name], **SMALL, "drop_rate": 0.1, "drop_path_rate": 0.1}
    net = OcticVisionTransformer(**options).train()
    net(images().float()).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.no_weight_decay() == {"cls_token", "pos_embed.0", "pos_embed.1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ("d2", "hybrid", "d2_inv_early", "d2 with mixer"))
def test_compiles_without_graph_break(name: str) -> None:
    """torch.compile of forward and backward in one graph equals eager."""
    net, x = make(name).float(), images().float()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (24, 28)}, r"patches of 4: group mirror needs an even number of columns"),
        ({"patch_size": 8, "img_size": 24}, "3 x 3 patches"),
        ({"patch_size": 3, "img_size": 24}, "patch_size: group mirror needs an even number"),
        ({"embed_dim": 33, "num_heads": 1}, "multiple of 2"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"invariant_at": "middle"}, "known: switch, head"),
        ({**EQUIVARIANT, "octic_equi_break_layer": 2}, "all 4 blocks octic"),
        ({"group": "D4", "img_size": 32, "invariant": True, "invariant_proj": False}, "24"),
    ],
)
def test_impossible_options_are_refused_in_one_line(
    options: dict[str, object], message: str
) -> None:
    """The line says what is wrong and what would do."""
    with pytest.raises(ValueError, match=message) as caught:
        OcticVisionTransformer(**{**HYBRID, **SMALL, **options})
    assert "\n" not in str(caught.value)


def test_positions_may_begin_at_zero():
    net = timm.create_model(
        "d2_deit_tiny_patch16_LS", depth=2, embed_dim=16, num_heads=2, img_size=32, pos_embed_std=0
    )
    assert not any(parameter.any() for parameter in net.pos_embed)
