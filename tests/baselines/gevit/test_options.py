"""Options with each other: oblong images, dropout of every kind, patches with more symmetries."""

import pytest
import torch

from baselines.gevit.groups import get_group
from baselines.gevit.network import GEViT
from baselines.gevit.stems import make_patch_stem
from octic.groups import OCTIC_ELEMENTS
from tests.baselines.gevit.test_equivariance import EXACT, error, randomised, small

RATES = ("attn_drop_rate", "value_drop_rate", "input_drop_rate", "pool_drop_rate")
OBLONG = {
    "plain": {"img_size": (12, 16)},
    "crops": {"img_size": (12, 16), "crop": (2, 1), "expansion": (1, 2)},
    "patches": {
        "img_size": (24, 16),
        "stem": "patch",
        "stem_options": {"patch_size": 4, "width": 8},
    },
    "G-CNN": {
        "img_size": (15, 27),
        "stem": "gcnn",
        "stem_options": {"num_hidden": 2, "kernel_size": 3, "pool": 6, "keep_group": True},
    },
}


@pytest.mark.parametrize("options", OBLONG.values(), ids=OBLONG)
@pytest.mark.parametrize("name", ["p4m", "mz2"])
def test_oblong_images_keep_the_law(name, options):
    """Upright or lying: logits stay, maps turn along."""
    net = randomised(small(name, **options))
    x = torch.randn(1, 1, *net.img_size, dtype=torch.float64)
    with torch.no_grad():
        logits, (still,) = net(x), net.features(x)
        for element in net.plane_group.grid_elements:
            turned = element.on_images(x)
            assert error(net(turned), logits) < EXACT, element.name
            found = net.features(turned)[0].patches.permute(0, 3, 1, 2)
            assert error(found, element.on_images(still.patches.permute(0, 3, 1, 2))) < EXACT


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("recompute", [True, False])
def test_every_rate_drops_something_in_training_alone(name, recompute):
    rates = {**dict.fromkeys(RATES, 0.0), name: 0.5}
    net = randomised(small(**rates, recompute=recompute)).train()
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64)
    assert error(net(x), net(x)) > 1e-3
    bare = small(**dict.fromkeys(RATES, 0.0)).double()
    # A dropout after a pool shifts the numbers in the names, as published.
    weights = zip(bare.state_dict(), net.state_dict().values(), strict=True)
    bare.load_state_dict(dict(weights))
    assert torch.equal(net.eval()(x), bare(x))


@pytest.mark.parametrize("layer", ["lifting_self_attention", "transformer.0.attention.2"])
def test_both_attentions_drop_their_weights(layer):
    net = randomised(small(attn_drop_rate=0.5, value_drop_rate=0.0))
    part = net.get_submodule(layer)
    maps = 1 if part is net.lifting_self_attention else 4
    x = torch.randn(1, *([1] if maps == 1 else [8, 4]), 6, 6, dtype=torch.float64)
    assert torch.equal(part(x), part(x))
    part.train()
    assert error(part(x), part(x)) > 1e-3


@pytest.mark.parametrize(
    ("options", "count"), [({}, 4), ({"mirrors": True}, 8), ({"rotations": 4, "mirrors": False}, 4)]
)
def test_patches_may_be_averaged_over_more_than_the_group(options, count):
    """Then their map turns along under those symmetries too, and under no others."""
    stem = randomised(make_patch_stem(get_group("p4"), 2, patch_size=4, width=5, **options))
    x = torch.randn(1, 2, 8, 12, dtype=torch.float64)
    y = stem(x)
    gaps = [error(stem(e.on_images(x)), e.on_images(y)) for e in OCTIC_ELEMENTS]
    assert sum(gap < EXACT for gap in gaps) == count and max(gaps[:4]) < EXACT


def test_patches_turn_where_the_group_only_mirrors():
    """One rotation of mz2, or all four if asked for."""
    for rotations, count in ((None, 2), (2, 4), (4, 8)):
        stem = make_patch_stem(get_group("mz2"), 1, rotations=rotations)
        assert len(stem.elements) == count


def test_a_pixel_of_the_last_map_is_as_wide_as_stem_and_pools_make_it():
    options = {"stem": "patch", "stem_options": {"patch_size": 4, "width": 8}}
    net = small(img_size=32, pool_last=True, **options)
    assert net.patch_size == 8 and net.feature_info[0]["reduction"] == 4
    assert net.features(torch.randn(1, 1, 32, 32))[0].patches.shape[1:3] == (4, 4)


def test_a_fresh_head_is_drawn_as_the_first_one():
    """N(0, scale / sqrt(fan in)), the scale being the net's own."""
    net = GEViT(num_channels=96, num_heads=1, window=3, block_sizes=(1,), whitening_scale=3.0)
    for classes in (None, 400):
        if classes:
            net.reset_classifier(classes)
        deviation = float(net.get_classifier().weight.detach().std())
        assert deviation == pytest.approx(3.0 / 96**0.5, rel=0.1)


def test_a_pruned_net_ends_in_the_map_of_its_last_block():
    """Without a head, as timm prunes; and recomputation is asked for without a word more."""
    net, x = small(expansion=(1, 2), recompute=False).eval(), torch.randn(2, 1, 12, 12)
    (still,) = net.forward_intermediates(x, [0], intermediates_only=True)
    net.set_grad_checkpointing()
    assert all(m.recompute for m in net.modules() if hasattr(m, "recompute"))
    assert net.prune_intermediate_layers([0]) == [0]
    assert (net.num_classes, net.depth, net.embed_dim) == (0, 1, 8)
    torch.testing.assert_close(net(x).mean(dim=2), still)
