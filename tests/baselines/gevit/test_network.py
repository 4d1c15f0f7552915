"""Nets as a Backbone and as timm's own, their counts, and settings that are refused."""

import pytest
import timm
import torch
from torch import nn

from baselines.gevit import GEViT, models
from evaluation.symmetry.equivariance import measure
from utils.flops import count_one_image
from utils.symmetry import SYMMETRIES
from vit.backbone import Backbone

SMALL = {"img_size": 12, "num_channels": 8, "num_heads": 2, "block_sizes": (1, 1), "window": 3}
# Of the published models with a window of 5.
PARAMETERS = {
    "gevit_rotmnist_z2": 44_368,
    "gevit_rotmnist_p4": 44_428,
    "gevit_rotmnist_p8": 44_508,
    "gevit_rotmnist_p4m": 44_508,
    "gevit_rotmnist_p12": 44_588,
    "gevit_rotmnist_p16": 44_668,
    "gevit_rotmnist_p8m": 44_668,
    "gevit_rotmnist_mz2": 44_388,
    "gevit_cifar10_z2": 3_001_648,
    "gevit_cifar10_mz2": 3_001_808,
    "gevit_pcam_p4": 207_034,
    "gevit_pcam_p8": 207_178,
    "gevit_pcam_p4_published": 207_034,
    "modern_gevit_pcam_patch2": 80_678,
    "modern_gevit_pcam_patch3": 82_598,
    "modern_gevit_pcam_patch6": 92_966,
    "modern_gevit_pcam_patch12": 134_438,
    "modern_gevit_pcam_patch16": 177_446,
}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", [str(name) for name in models.default_cfgs])
def test_registered_models(name):
    """Parameters as published, no operator uncounted, and a description that is true."""
    with torch.device("meta"):
        net = timm.create_model(name)
        count = count_one_image(net, net.img_size[0], backward=False)
    assert parameters(net) == PARAMETERS.get(name, parameters(net))
    assert count.forward > 0 and not count.uncounted
    config = net.default_cfg
    assert config["input_size"] == (net.in_chans, *net.img_size)
    assert config["num_classes"] == net.num_classes
    state = net.state_dict()
    assert f"{config['first_conv']}.weight" in state and f"{config['classifier']}.weight" in state
    assert isinstance(net, Backbone)


def test_the_published_hybrid_has_the_published_count():
    """A G-CNN over eight elements before attention over four."""
    with torch.device("meta"):
        net = models.gevit_pcam_gcnn_p4m(group="p4", stem_options={"group": "D4"})
    assert (parameters(net), parameters(net.stem)) == (136_558, 90_200)


def test_counts_do_not_depend_on_the_tiles_and_cover_the_backward_pass():
    counts = []
    for memory_mb in (64.0, 1e-3):
        net = GEViT(**SMALL, memory_mb=memory_mb, recompute=False)
        counts.append(count_one_image(net, 12))
    assert counts[0].forward == counts[1].forward > 0
    assert counts[0].backward == counts[1].backward
    assert not counts[0].uncounted


def test_features_are_a_backbones():
    net = GEViT(**SMALL, expansion=(1, 2), crop=(1, 0)).eval()
    first, last = net.features(torch.randn(2, 1, 12, 12), (0, -1))
    assert (first.cls.shape, first.patches.shape) == ((2, 8), (2, 10, 10, 8))
    assert (last.cls.shape, last.patches.shape) == ((2, 16), (2, 5, 5, 16))
    assert (net.embed_dim, net.patch_size, net.depth) == (16, 2, 2)
    torch.testing.assert_close(last.cls, last.patches.mean((1, 2)))
    with pytest.raises(ValueError, match="with blocks 0 to 1"):
        net.features(torch.randn(1, 1, 12, 12), (2,))


def test_the_equivariance_report_reads_it():
    """The pooled vector of a p4m net stays and its patches turn along, under all eight."""
    net = timm.create_model("gevit_digits_p4m", num_channels=8).double().eval()
    errors = measure(net, torch.randn(1, 3, 32, 32, dtype=torch.float64)).turns
    assert set(errors) == set(SYMMETRIES)
    assert max(max(error.cls, error.patches) for error in errors.values()) < 1e-12


def test_grey_nets_take_rgb():
    """Probes hand out RGB; a network of one channel takes their mean."""
    net = GEViT(**SMALL).double().eval()
    grey = torch.randn(2, 1, 12, 12).double()
    torch.testing.assert_close(net(grey.expand(-1, 3, -1, -1)), net(grey))
    with pytest.raises(ValueError, match=r"shape \(1, 2, 12, 12\) for a model of 1 channels"):
        net(torch.randn(1, 2, 12, 12).double())


def test_timms_interface():
    net = timm.create_model("gevit_digits_p4m", num_classes=7, num_channels=8).eval()
    x = torch.randn(2, 3, 32, 32)
    assert net(x).shape == (2, 7) and net.get_classifier() is net.head
    torch.testing.assert_close(net.forward_head(net.forward_features(x)), net(x))
    last, maps = net.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 4, 4), (2, 8, 2, 2)]
    torch.testing.assert_close(last, net.forward_features(x))
    groups = timm.models.group_parameters(net, net.group_matcher())
    names = {name for name, _ in net.named_parameters()}
    assert {name for members in groups.values() for name in members} == names
    pooled = net.forward_head(net.forward_features(x), pre_logits=True)
    net.reset_classifier(0)
    torch.testing.assert_close(net(x), pooled)
    net.reset_classifier(0, "")
    assert net(x).shape == (2, 8, 8, 2, 2)
    net.reset_classifier(3, "avg")
    assert net(x).shape == (2, 3) and net.num_classes == 3
    net.set_grad_checkpointing(False)
    assert not any(getattr(m, "recompute", False) for m in net.modules())
    assert timm.data.create_transform(**timm.data.resolve_data_config(model=net)) is not None
    found = timm.create_model("gevit_digits_p4m", features_only=True, out_indices=(0,))
    assert [tuple(m.shape) for m in found(x)] == [(2, 24, 4, 4)]
    with pytest.raises(ValueError, match="unknown global_pool 'max'"):
        net.reset_classifier(3, "max")
    net.prune_intermediate_layers([0])
    assert net.patch_size == net.feature_info[0]["reduction"]


def test_training_moves_every_parameter():
    """Only what softmax cannot tell (a constant on all scores of a query) has no gradient."""
    net = GEViT(**SMALL, group="p4m", norm_between=True, pool_drop_rate=0.1, input_drop_rate=0.1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    net(torch.randn(3, 1, 12, 12)).square().sum().backward()
    inert = ("key.bias", "embedding.3.bias")
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith(inert) or parameter.grad.abs().max() > 0, name


def test_initialisation():
    """Convolutions N(0, sqrt(2 / fan in)), biases 0, the group's table N(0, 1)."""
    net = GEViT(group="p16", num_channels=96, num_heads=2, window=3, img_size=28)
    weight = net.transformer[0].attention[2].query.weight
    assert float(weight.detach().std()) == pytest.approx((2 / 96) ** 0.5, rel=0.05)
    assert not net.transformer[0].attention[2].query.bias.any()
    tables = torch.cat([b.attention[2].group_embedding.weight.flatten() for b in _blocks(net)])
    assert float(tables.detach().std()) == pytest.approx(1, rel=0.1)


def _blocks(net: GEViT) -> list[nn.Module]:
    return [layer for layer in net.transformer if hasattr(layer, "attention")]


def test_an_odd_number_of_channels():
    net = GEViT(**{**SMALL, "num_channels": 9}).eval()
    images = torch.randn(1, 1, 12, 12)
    torch.testing.assert_close(net(images.rot90(1, (-2, -1))), net(images))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"img_size": 13}, r"13 x 13.*after stage 0: choose img_size.*allow_odd=True"),
        ({"img_size": 12, "window": 4}, "odd side.*4 is even"),
        ({"num_channels": 6}, "num_channels must be a multiple of 4, or 1 more, not 6"),
        ({"crop": (6, 0)}, "nothing is left of the map after the crops up to block 0 of stage 0"),
        ({"crop": (1,)}, r"crop has 1 entries for 2 blocks: \[1\]"),
        ({"expansion": (1, 2, 3)}, r"expansion has 3 entries for 2 stages"),
        ({"block_sizes": (0, 0), "crop": 0}, "and some at least, not"),
        ({"block_sizes": ()}, "block_sizes are numbers of blocks"),
        ({"stem": "cnn"}, "stem must be one of none, patch, gcnn"),
        ({"stem_options": {"width": 8}}, "stem_options width go with stem=patch or stem=gcnn"),
        ({"stem": "patch", "stem_options": {"p": 1}}, "stem_options of stem=patch: .*'p'"),
        (
            {"stem": "patch", "stem_options": {"patch_size": 5}},
            "not a multiple of the patch size 5",
        ),
        ({"stem": "patch", "img_size": 20}, "5 x 5.*allow_odd=True"),
        (
            {"stem": "patch", "group": "p4m", "stem_options": {"mirrors": False}},
            "without mirroring lack m, mr, mrr, mrrr of the group p4m",
        ),
        ({"stem": "gcnn"}, "the G-CNN stem leaves -20 x -20 pixels"),
        (
            {"stem": "gcnn", "group": "p8", "stem_options": {"keep_group": True}},
            "symmetries of the pixel grid alone, p8 has more",
        ),
        (
            {"stem": "gcnn", "stem_options": {"keep_group": True, "out_channels": 9}},
            "the stem's out_channels, 9, must be num_channels, 8",
        ),
        ({"window": None, "img_size": (12, 14)}, "needs square maps, not 12 x 14"),
        ({"norm": "group"}, "norm must be one of layer, batch"),
        ({"act": "gelu"}, "act must be one of swish, relu"),
        ({"group_table": "old"}, "group_table must be one of .*not 'old'"),
        ({"drop_path_rate": 0.1}, "no stochastic depth"),
        ({"attn_drop_rate": 3.0}, r"attn_drop_rate must lie in \[0, 1\), not 3.0"),
        ({"value_drop_rate": 1.5}, r"value_drop_rate must lie in \[0, 1\], not 1.5"),
        ({"memory_mb": 0}, "memory_mb must be finite and above 0, not 0"),
        ({"memory_mb": -1}, "memory_mb must be finite and above 0, not -1"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1, not 0"),
        ({"in_chans": 0}, "in_chans must be a whole number from 1, not 0"),
        ({"num_channels": 8.0}, "num_channels must be a whole number from 1, not 8.0"),
        ({"window": 2.5}, "positive odd side, not 2.5"),
        ({"expansion": 1.5}, "expansion must be a whole number from 0, not 1.5"),
        ({"expansion": (1, -1)}, "expansion must be a whole number from 0, not -1"),
        ({"crop": 0.5}, "crop must be a whole number from 0, not 0.5"),
        ({"block_sizes": 2}, "block_sizes are numbers of blocks, .*not 2"),
        ({"block_sizes": (1.5, 1)}, "block_sizes must be a whole number from 0, not 1.5"),
        ({"img_size": [12]}, r"img_size must be one side or \(height, width\), not \[12\]"),
        (
            {"stem": "patch", "stem_options": {"mirrors": "no"}},
            "stem_options.mirrors must be true or false, not 'no'",
        ),
        (
            {"stem": "patch", "stem_options": {"patch_size": "3"}},
            "stem_options.patch_size must be a whole number from 1, not '3'",
        ),
        (
            {"stem": "patch", "stem_options": {"width": 0}},
            "stem_options.width must be a whole number from 1, not 0",
        ),
        (
            {"stem": "gcnn", "stem_options": {"pool_group": False}},
            "keep_group=true keeps the group's axis, not pool_group",
        ),
        (
            {"stem": "gcnn", "stem_options": {"pool": 0}},
            "pool must be a whole number from 1, not 0",
        ),
        (
            {"stem": "gcnn", "stem_options": {"hidden_channels": 0}},
            "hidden_channels must be a whole number from 1, not 0",
        ),
    ],
)
def test_settings_that_are_refused(options, said):
    """Each in one line."""
    with pytest.raises(ValueError, match=said) as error:
        GEViT(**{**SMALL, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("window", [3, None])
def test_no_images_give_no_logits(window):
    """An empty batch has a shape, and gradients of zero."""
    net = GEViT(**{**SMALL, "window": window}, attn_drop_rate=0.5).train()
    logits = net(torch.zeros(0, 1, 12, 12))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert net.features(torch.zeros(0, 1, 12, 12))[0].patches.shape == (0, 6, 6, 8)


def test_odd_sizes_are_refused_when_they_come_too():
    """A window takes images of any size; pools meet even extents or refuse them."""
    net = GEViT(**SMALL).eval()
    assert net(torch.randn(1, 1, 16, 20)).shape == (1, 10)
    with pytest.raises(ValueError, match="15 x 15.*give images of another size"):
        net(torch.randn(1, 1, 15, 15))
    assert GEViT(**SMALL, allow_odd=True)(torch.randn(1, 1, 15, 15)).shape == (1, 10)
    assert GEViT(**{**SMALL, "group": "z2", "img_size": 13})(torch.randn(1, 1, 13, 13)).ndim == 2
    cropping = GEViT(**SMALL, crop=(2, 0))
    with pytest.raises(ValueError, match="nothing is left of a map of 4 x 4 after cropping 2"):
        cropping(torch.randn(1, 1, 4, 4))
