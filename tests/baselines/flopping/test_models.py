"""Whole nets: invariance, features, timm's interface, published sizes, refusals."""

import pytest
import timm
import torch
from torch import nn

import baselines.flopping  # noqa: F401  (registers the models)
from baselines.flopping.convnext import MirrorConvNeXt
from baselines.flopping.plain import PlainConvNeXt, PlainResMlp
from baselines.flopping.resmlp import MirrorResMlp
from tests.baselines.flopping.cases import (
    CONVNEXT,
    ISOTROPIC,
    RESMLP,
    convnext,
    images,
    isotropic,
    mirrored,
    relative,
    resmlp,
    shaken,
)
from utils.flops import multiply_adds
from vit.backbone import Backbone

SYMMETRIC = {"invariant": "power_spectrum"}
NETS = {
    "resmlp": lambda: resmlp(),
    "resmlp_symmetrized": lambda: resmlp(**SYMMETRIC),
    "resmlp_space": lambda: resmlp(pooling="space", scaled_stem=True, affine_bias=False),
    "resmlp_space_symmetrized": lambda: resmlp(pooling="space", **SYMMETRIC),
    "resmlp_gelu": lambda: resmlp(activation="gelu"),
    "resmlp_oblong": lambda: resmlp(img_size=(20, 32), patch_size=4),
    "convnext": lambda: convnext(),
    "convnext_symmetrized": lambda: convnext(init_values=None, **SYMMETRIC),
    "convnext_mean": lambda: convnext(downsampling="mean", depthwise="symmetric"),
    "convnext_max": lambda: convnext(invariant="max_filtering"),
    "isotropic": lambda: isotropic(init_values=None),
    "isotropic_symmetrized": lambda: isotropic(activation="gelu_tanh", **SYMMETRIC),
    "isotropic_odd_grid": lambda: isotropic(img_size=(32, 20), kernel_size=3),
}
PLAIN = {
    "resmlp": lambda: shaken(PlainResMlp(**RESMLP)),
    "convnext": lambda: shaken(PlainConvNeXt(**CONVNEXT)),
    "convnext_mean": lambda: shaken(PlainConvNeXt(**CONVNEXT, downsampling="mean")),
    "isotropic": lambda: shaken(PlainConvNeXt(**ISOTROPIC)),
}
# Published: trainable parameters, multiply-adds of one 224-pixel image in G. Besides, the published
# nets count 196 integers (d2 ResMLP: token orders) and the frozen centre columns (d2 ConvNeXt).
PUBLISHED = {
    "resmlp_12": (15_350_872, 3.010),
    "resmlp_24": (30_020_680, 5.961),
    "resmlp_36": (44_690_488, 8.913),
    "resmlpB_24": (115_736_776, 23.021),
    "resmlpL_24": (318_105_288, 63.030),
    "resmlp_equi_d2_12": (7_702_456, 1.505),
    "resmlp_equi_d2_24": (15_063_880, 2.981),
    "resmlp_equi_d2_B_24": (57_972_616, 11.453),
    "resmlp_equi_d2_L_24": (159_224_456, 31.290),
    "convnext_isotropic_small": (22_308_712, 4.286),
    "convnext_isotropic_base": (87_083_752, 16.896),
    "convnext_isotropic_large": (305_905_640, 59.699),
    "d2_convnext_isotropic_small": (11_158_312, 2.176),
    "d2_convnext_isotropic_base": (43_549_288, 8.457),
    "d2_convnext_isotropic_large": (152_971_752, 29.898),
    "flopping_convnext_tiny": (28_589_128, 4.455),
    "flopping_convnext_small": (50_223_688, 8.684),
    "flopping_convnext_base": (88_591_464, 15.355),
    "flopping_convnext_large": (197_767_336, 34.361),
    "flopping_convnext_xlarge": (350_196_968, 60.921),
    "d2_convnext_tiny": (14_302_072, 2.345),
    "d2_convnext_small": (25_126_264, 4.493),
    "d2_convnext_base": (44_314_792, 7.904),
    "d2_convnext_large": (98_912_008, 17.598),
    "d2_convnext_xlarge": (175_136_104, 31.119),
}

QUICK = ("_12", "isotropic_small", "_tiny")


@pytest.mark.parametrize("name", NETS)
def test_logits_are_invariant_and_maps_equivariant(name: str) -> None:
    """f(mirrored) = f(image), the maps move along; turned upside down it is another image."""
    net = NETS[name]()
    x = images(net)
    y = net(x)
    assert relative(net(x.flip(-1)), y) <= 1e-12
    assert relative(net(x.flip(-2)), y) > 1e-3
    for one, other in zip(net.features(x), net.features(x.flip(-1)), strict=True):
        assert relative(other.cls, one.cls) <= 1e-12
        assert relative(other.patches, one.patches.flip(2)) <= 1e-12
    for one, other in zip(
        net.forward_intermediates(x, intermediates_only=True),
        net.forward_intermediates(x.flip(-1), intermediates_only=True),
        strict=True,
    ):
        moved = mirrored(one.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert relative(other, moved) <= 1e-12


@pytest.mark.parametrize("name", NETS)
def test_whole_path_gives_the_same_logits(name: str) -> None:
    """What the last block leaves out changes nothing, and every parameter has a gradient."""
    net = NETS[name]()
    x = images(net)
    assert relative(net(x), net.forward_head(net.forward_features(x))) <= 1e-12
    assert (
        relative(net.forward_head(net.forward_features(x), pre_logits=True), net.features(x)[0].cls)
        <= 1e-12
    )
    plain = net(x)
    net.set_grad_checkpointing()
    again = net(x)
    again.square().sum().backward()
    assert relative(again, plain) <= 1e-14
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize("family", (NETS, PLAIN), ids=("mirror", "plain"))
def test_backbone_contract(family: dict) -> None:
    """Features of any blocks of the last stage, in the order asked for, of one width."""
    for make in family.values():
        net = make()
        x = images(net)
        assert isinstance(net, Backbone)
        grid = tuple(side // net.patch_size for side in x.shape[-2:])
        last, first = net.features(x, (-1, 0))
        assert torch.equal(last.patches, net.features(x)[0].patches)
        assert first.cls.shape == (2, net.embed_dim) == (2, net.num_features)
        assert first.patches.shape == (2, *grid, net.embed_dim)
        with pytest.raises(ValueError, match=f"blocks 0 to {net.depth - 1}"):
            net.features(x, (net.depth,))


@pytest.mark.parametrize("family", (NETS, PLAIN), ids=("mirror", "plain"))
def test_head_can_be_replaced(family: dict) -> None:
    """timm's reset_classifier and get_classifier."""
    for make in family.values():
        net = make()
        x = images(net)
        net.reset_classifier(3)
        assert net(x).shape == (2, 3) == (2, net.get_classifier().out_features)
        net.reset_classifier(0)
        assert net(x).shape == (2, net.num_features)


@pytest.mark.parametrize(
    "name",
    [
        name if name.endswith(QUICK) else pytest.param(name, marks=pytest.mark.slow)
        for name in PUBLISHED
    ],
)
def test_published_sizes(name: str) -> None:
    """Parameters to the last one, multiply-adds to the published digits."""
    with torch.device("meta"):
        net = timm.create_model(name)
    parameters, gmac = PUBLISHED[name]
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert abs(multiply_adds(net, 224) / 1e9 - gmac) <= 6e-4
    assert net.pretrained_cfg["architecture"] == name


def test_timm_keeps_its_own() -> None:
    """Our registrations overwrite none of timm's."""
    for name in ("convnext_tiny", "convnext_xlarge", "resmlp_12_224"):
        assert timm.model_entrypoint(name).__module__.startswith("timm.")
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("resmlp_equi_d2_12", depth=1, pretrained=True)


def test_as_timm_backbones() -> None:
    """features_only and img_size work through timm's factory."""
    net = timm.create_model("d2_convnext_tiny", features_only=True, dims=(8, 16, 24, 32))
    maps = net(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 16), (16, 8, 8), (24, 4, 4), (32, 2, 2)]
    assert net.feature_info.channels() == [8, 16, 24, 32]
    net = timm.create_model("d2_convnext_tiny", features_only=True, depths=(1, 1), dims=(8, 16))
    assert net.feature_info.channels() == [8, 16]
    net = timm.create_model("resmlp_equi_d2_12", img_size=64, embed_dim=16, num_classes=7)
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_plain_twins_are_timms_functions() -> None:
    """Of the same weights, the plain ConvNeXt computes what timm's own does."""
    theirs = timm.models.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), num_classes=5)
    theirs = shaken(theirs)
    ours = PlainConvNeXt(**CONVNEXT).double().eval()
    ours.load_state_dict(ours.rename_state(theirs.state_dict()))
    x = images(ours)
    assert relative(ours(x), theirs(x)) <= 1e-12


def test_weight_decay_is_the_same_for_both_twins() -> None:
    """Gains, shifts and layer scales are spared by name or as vectors, in all families."""
    pairs = ((MirrorResMlp, PlainResMlp, RESMLP), (MirrorConvNeXt, PlainConvNeXt, CONVNEXT))
    for *classes, options in pairs:
        for made in classes:
            net = made(**options)
            spared = net.no_weight_decay()
            decayed = {n for n, p in net.named_parameters() if p.ndim > 1 and n not in spared}
            assert decayed and not any(
                word in name for name in decayed for word in ("alpha", "beta", "gamma", "ls1")
            )


def test_drop_path_rises_in_convnext_alone() -> None:
    """ConvNeXt: from zero to the rate over all blocks; ResMLP: the rate in every block."""
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in convnext(drop_path_rate=0.4).blocks]
    assert torch.allclose(torch.tensor(rates), torch.linspace(0, 0.4, 5))
    assert {b.drop_path.drop_prob for b in resmlp(drop_path_rate=0.4).blocks} == {0.4}


@pytest.mark.parametrize("make", (convnext, isotropic))
def test_any_width_where_that_is_allowed(make) -> None:
    """A lawful width gives what it did; of another one the last columns go unread."""
    net = make()
    other = make(allow_odd=True)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x := images(net)), net(x))
    x = images(net, width=net.img_size[1] + net.feature_info[0]["reduction"] - 1)
    assert torch.equal(other(x), net(x[..., : net.img_size[1]]))


def test_scaled_stem_and_affine_bias_are_what_they_say() -> None:
    """Tokens at the plain scale; shifts that count, from zero."""
    net, scaled = resmlp(), resmlp(scaled_stem=True)
    scaled.load_state_dict(net.state_dict())
    x = images(net)
    assert relative(scaled.embed(x) * 2**0.5, net.embed(x)) <= 1e-14
    bare = resmlp(affine_bias=False)
    bare.load_state_dict(net.state_dict(), strict=False)
    assert relative(bare(x), net(x)) > 1e-3
    assert not any(p.any() for n, p in MirrorResMlp(**RESMLP).named_parameters() if "shift" in n)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resmlp(img_size=36), "9 columns of patches.*even number"),
        (lambda: resmlp(img_size=30), "30 x 30 is not a multiple of the patch size 4"),
        (
            lambda: resmlp(img_size=(36, 32), patch_size=4)(torch.zeros(1, 3, 32, 32).double()),
            "given to a ResMLP of 36 x 32",
        ),
        (lambda: resmlp(patch_size=5, img_size=40), "even number of columns"),
        (lambda: resmlp(embed_dim=15), "not a multiple of 2"),
        (lambda: resmlp(pooling="max"), "pooling must be one of spectrum, space"),
        (lambda: resmlp(invariant="canonization"), "trivial or power_spectrum"),
        (lambda: resmlp(invariant="abs", pooling="space"), "unknown invariantization 'abs'"),
        (lambda: convnext(img_size=48), "width must be a multiple of 32"),
        (lambda: convnext()(torch.zeros(1, 3, 64, 80).double()), "width must be a multiple of 32"),
        (lambda: convnext()(torch.zeros(1, 1, 64, 64).double()), "for a network of 3 channels"),
        (lambda: convnext(dims=(8, 12, 16, 22)), "22 is not a multiple of 4"),
        (lambda: convnext(dims=(8, 12)), "not of equal length"),
        (lambda: convnext(depths=(-1, 1, 1, 1)), "depths must be a whole number from 0, not -1"),
        (lambda: convnext(downsampling="max"), "downsampling must be one of conv, mean"),
        *(
            (lambda make=make, rate=rate: make(rate), rf"drop_path_rate must lie.*, not {rate}")
            for make in (
                lambda rate: resmlp(drop_path_rate=rate),
                lambda rate: convnext(drop_path_rate=rate),
                lambda rate: PlainResMlp(**RESMLP, drop_path_rate=rate),
                lambda rate: PlainConvNeXt(**CONVNEXT, drop_path_rate=rate),
            )
            for rate in (1.0, -0.5)
        ),
        (lambda: resmlp(img_size=[32]), r"one side or \(height, width\), not \[32\]"),
        (
            lambda: timm.create_model("resmlp_12", img_size=[32, 32, 32]),
            r"one side or \(height, width\)",
        ),
        (
            lambda: timm.create_model("resmlp_12", in_chans=0),
            "in_chans must be a whole number from 1, not 0",
        ),
        (
            lambda: timm.create_model("resmlp_12", depth=0),
            "depth must be a whole number from 1, not 0",
        ),
        (lambda: timm.create_model("d2_convnext_tiny", depths=3), "depths must be a list, not 3"),
        (lambda: PlainConvNeXt(**CONVNEXT, kernel_size=2), "kernel's side must be odd, not 2"),
        (lambda: PlainConvNeXt(**CONVNEXT, in_chans=0), "in_chans must be a whole number"),
        (lambda: resmlp(patch_size=0), "patch_size must be a whole number from 1, not 0"),
        (lambda: convnext(patch_size=0), "patch_size must be a whole number from 1, not 0"),
        (lambda: PlainResMlp(**{**RESMLP, "patch_size": 0}), "patch_size must be a whole number"),
        (lambda: resmlp(depth=0), "depth of the last stage must be a whole number from 1, not 0"),
        (lambda: isotropic(depths=(0,)), "depth of the last stage must be a whole number from 1"),
        (lambda: isotropic(img_size=30), "width must be a multiple of 4"),
        (lambda: isotropic(patch_size=5, img_size=40), "even number of columns"),
        (lambda: PlainResMlp(**{**RESMLP, "img_size": 30}), "not a multiple of the patch size"),
        (lambda: PlainResMlp(**RESMLP)(torch.zeros(1, 3, 64, 64)), "given to a ResMLP of 32 x 32"),
        (lambda: PlainConvNeXt(**{**CONVNEXT, "img_size": 16}), "16 x 16 is below 32"),
    ],
)
def test_bad_settings_say_what_is_wrong(make, message: str) -> None:
    """One line that names the setting and what would be right."""
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ("resmlp_equi_d2_12", "d2_convnext_tiny", "convnext_isotropic_small")
)
def test_unknown_keywords_are_refused(name: str) -> None:
    """Nothing is swallowed in silence, as `use_fused_attn` was by the published ResMLP."""
    with pytest.raises(TypeError, match="use_fused_attn"):
        timm.create_model(name, use_fused_attn=True)


@pytest.mark.slow
@pytest.mark.parametrize("make", (resmlp, convnext))
def test_compiles_without_a_graph_break(make) -> None:
    """torch.compile takes the whole net."""
    net: nn.Module = make().float()
    x = images(net).float()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), net(x)) <= 1e-5
