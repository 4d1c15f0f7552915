"""The law, per element, in float64: layers, blocks, stems and whole nets."""

import pytest
import torch

from baselines.gevit.attention import GroupSelfAttention, LiftingSelfAttention
from baselines.gevit.block import Block
from baselines.gevit.gcnn import GCNN, GroupConv, LiftingConv
from baselines.gevit.groups import GROUPS, get_group
from baselines.gevit.network import GEViT
from baselines.gevit.stems import AlignedGCNN, make_patch_stem
from octic.groups import OCTIC_ELEMENTS, inverse, multiply
from octic.groups import get_group as get_grid_group

named = pytest.mark.parametrize("name", GROUPS)
EXACT = 1e-12


def randomised(module):
    """Float64 with every parameter drawn anew: no zero bias and no unit gain hides a fault."""
    module.double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return module


def error(found, expected):
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def moved(x, group, element):
    """T x[g R(T)] of a map on the group."""
    return element.on_images(x)[:, :, group.permutation(element)]


WHERE = [{"window": 3}, {"map_size": 5}]


@named
@pytest.mark.parametrize("where", WHERE, ids=["local", "global"])
def test_lifting(name, where):
    group = get_group(name)
    layer = randomised(LiftingSelfAttention(group, 2, 4, 3, 2, **where))
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    y = layer(x)
    for element in group.grid_elements:
        assert error(layer(element.on_images(x)), moved(y, group, element)) < EXACT, element.name


@named
@pytest.mark.parametrize("where", WHERE, ids=["local", "global"])
def test_group_attention(name, where):
    group = get_group(name)
    layer = randomised(GroupSelfAttention(group, 3, 5, 2, 2, **where))
    x = torch.randn(1, 3, group.order, 5, 5, dtype=torch.float64)
    y = layer(x)
    for element in group.grid_elements:
        found = layer(moved(x, group, element))
        assert error(found, moved(y, group, element)) < EXACT, element.name


def test_symmetries_that_a_group_lacks_do_not_hold():
    """The tests above can fail: p4 does not know mirroring, nor z2 turning."""
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    for name, element in (("p4", OCTIC_ELEMENTS[4]), ("z2", OCTIC_ELEMENTS[1])):
        layer = randomised(LiftingSelfAttention(name, 2, 4, 3, 2, window=3))
        summed = layer(x).sum(dim=2)
        found = layer(element.on_images(x)).sum(dim=2)
        assert error(found, element.on_images(summed)) > 1e-3


@pytest.mark.parametrize("name", ["p4m", "p8m"])
def test_the_published_table_breaks_mixed_groups(name):
    group = get_group(name)
    layer = randomised(GroupSelfAttention(group, 3, 6, 2, 1, window=3, group_table="reference"))
    x = torch.randn(1, 3, group.order, 4, 4, dtype=torch.float64)
    worst = max(
        error(layer(moved(x, group, e)), moved(layer(x), group, e)) for e in group.grid_elements
    )
    assert worst > 1e-4


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("name", ["p4", "p4m", "mz2"])
def test_block(name, norm):
    group = get_group(name)
    block = randomised(Block(group, 4, 6, 2, window=3, crop=1, norm=norm))
    x = torch.randn(1, 4, group.order, 6, 6, dtype=torch.float64)
    y = block(x)
    for element in group.grid_elements:
        assert error(block(moved(x, group, element)), moved(y, group, element)) < EXACT


def small(name="p4", **options):
    fixed = {"img_size": 12, "num_channels": 8, "num_heads": 2, "block_sizes": (1, 1), "window": 3}
    return GEViT(group=name, **{**fixed, **options})


NETS = {
    "plain": {},
    "crops": {"crop": (2, 1)},
    "global": {"window": None, "img_size": 6, "crop": (1, 0)},
    "between, pool last": {"norm_between": True, "pool_last": True, "expansion": (1, 2)},
    "batch norm": {"norm": "batch", "act": "relu"},
    "patches": {"stem": "patch", "img_size": 24, "stem_options": {"patch_size": 4, "width": 8}},
    "G-CNN": {
        "stem": "gcnn",
        "img_size": 15,
        "stem_options": {"num_hidden": 2, "kernel_size": 3, "pool": 6},
    },
    "G-CNN, group kept": {
        "stem": "gcnn",
        "img_size": 15,
        "stem_options": {"num_hidden": 2, "kernel_size": 3, "pool": 6, "keep_group": True},
    },
}


@pytest.mark.parametrize("options", NETS.values(), ids=NETS)
@pytest.mark.parametrize("name", ["p4", "p4m", "mz2", "p8"])
def test_nets_are_invariant_and_their_maps_turn_along(name, options):
    """Logits and pooled features stay, patches move, at every block."""
    if name == "p8" and options.get("stem_options", {}).get("keep_group"):
        pytest.skip("a G-CNN has no eight rotations")
    net = randomised(small(name, **options))
    x = torch.randn(1, 1, net.img_size[0], net.img_size[0], dtype=torch.float64)
    with torch.no_grad():
        logits, features = net(x), net.features(x, (0, -1))
        for element in net.plane_group.grid_elements:
            turned = element.on_images(x)
            assert error(net(turned), logits) < EXACT, element.name
            for found, still in zip(net.features(turned, (0, -1)), features, strict=True):
                assert error(found.cls, still.cls) < EXACT
                still_map = still.patches.permute(0, 3, 1, 2)
                found_map = found.patches.permute(0, 3, 1, 2)
                assert error(found_map, element.on_images(still_map)) < EXACT


@pytest.mark.parametrize("name", ["z2", "p4", "p4m"])
def test_untrained_nets_are_exact_too(name):
    """At the start positions are told by their sign alone: a table off by one bit would show."""
    net = small(name, window=5, img_size=8).double().eval()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for element in net.plane_group.grid_elements:
            assert error(net(element.on_images(x)), net(x)) < EXACT


@pytest.mark.parametrize("name", ["mirror", "half_turn", "V4", "C4", "D4"])
@pytest.mark.parametrize("padding", [0, 1])
def test_exact_convolutions(name, padding):
    """y(T_g x)[h] = T_g y(x)[g^-1 h], for both layers."""
    group = get_grid_group(name)
    elements = group.elements
    lift = randomised(LiftingConv(2, 3, 3, padding=padding, group=group))
    conv = randomised(GroupConv(3, 2, 3, padding=padding, group=group))
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    lifted = lift(x)
    y = conv(lifted)
    for g in elements:
        order = [elements.index(multiply(inverse(g), h)) for h in elements]
        found = lift(g.on_images(x))
        assert error(found, g.on_images(lifted)[:, :, order]) < EXACT
        assert error(conv(found), g.on_images(y)[:, :, order]) < EXACT


@pytest.mark.parametrize("name", ["p4", "p4m", "mz2"])
def test_stems(name):
    """Patches and a pooled G-CNN turn like images, a kept group like maps of the attention."""
    group = get_group(name)
    x = torch.randn(1, 2, 12, 12, dtype=torch.float64)
    options = {"num_hidden": 2, "kernel_size": 3, "pool": 3, "hidden_channels": 3}
    grid = {"p4": "C4", "p4m": "D4", "mz2": "mirror"}[name]
    kept = randomised(AlignedGCNN(group, 2, **options))
    for stem in (
        randomised(make_patch_stem(group, 2, patch_size=3, width=5)),
        randomised(GCNN(2, group=grid, **options)),
    ):
        for element in group.grid_elements:
            assert error(stem(element.on_images(x)), element.on_images(stem(x))) < EXACT
    for element in group.grid_elements:
        assert error(kept(element.on_images(x)), moved(kept(x), group, element)) < EXACT


@pytest.mark.parametrize("pool", [None, 1, 4])
@pytest.mark.parametrize("pool_group", [True, False])
def test_a_gcnn_says_what_size_comes_out(pool, pool_group):
    """Down to the smallest image that it takes, whose map is not reduced further."""
    stem = GCNN(1, num_hidden=2, kernel_size=3, out_channels=5, pool=pool, pool_group=pool_group)
    for height, width in ((8, 8), (9, 12)):
        maps = stem(torch.randn(1, 1, height, width))
        group = () if pool_group else (8,)
        assert maps.shape == (1, 5, *group, *stem.map_size(height, width))
        if pool is None:
            assert maps.shape[-2:] == (height - 4, width - 4)


def test_the_published_pcam_configuration_is_not_invariant():
    """Built only when asked for: its last pool meets an odd extent."""
    options = {"img_size": 14, "norm_between": True, "pool_last": True}
    with pytest.raises(ValueError, match="7 x 7.*allow_odd=True"):
        small(**options)
    net = randomised(small(allow_odd=True, **options))
    x = torch.randn(1, 1, 14, 14, dtype=torch.float64)
    assert error(net(OCTIC_ELEMENTS[1].on_images(x)), net(x)) > 1e-4


def test_reports_are_told_of_the_law_where_it_holds():
    """A net that is exact says so; a published table, odd pools or no group claim nothing."""
    net = small("p8m")
    assert net.invariant and net.switch == net.depth
    assert [e.name for e in net.group.elements] == [e.name for e in OCTIC_ELEMENTS]
    assert small("p4", group_table="reference").invariant  # the same table
    assert not small("p4m", group_table="reference").invariant
    lawless = small(allow_odd=True, img_size=14, norm_between=True, pool_last=True)
    for net in (small("z2"), lawless):
        assert net.group is None and net.switch == 0
