"""Closed forms against the published counter: its counts of small nets, every published row."""

import pytest
import timm
import torch

from baselines.token_reduction import costs, table
from baselines.token_reduction.published_rows import BASE, ROWS
from baselines.token_reduction.reduced import reduced
from baselines.token_reduction.table import PublishedTable
from utils.flops import count_operations

# A ViT of width 48, 6 blocks, 4 heads, MLP 96, patch 4, 10 classes at 32 and at 28 pixels.
PA = costs.Shape(6, 48, 4, 96, 4, (8, 8), 10)
PB = PA._replace(grid=(7, 7))
# Counted by the published code on torch 1.10.1. Its graphs hold some scalar operations besides.
COUNTED = {
    "base": (lambda: costs.base(PA), 10_745_053),
    "base_28": (lambda: costs.base(PB), 7_743_013),
    "hourglass": (lambda: costs.hourglass(PA, location=2, num_clusters=16), 5_724_705),
    "hourglass_output": (
        lambda: costs.hourglass(PA, location=1, num_clusters=25, iterations=3, after_output=True),
        6_573_946,
    ),
    "hourglass_first": (lambda: costs.hourglass(PB, location=0, num_clusters=9), 1_616_448),
    "evit": (lambda: costs.evit(PA, keep_rate=0.7, drop_blocks=[1, 3, 5]), 7_126_763),
    "evit_fused": (
        lambda: costs.evit(PA, keep_rate=0.5, drop_blocks=[0, 3], fuse_token=True),
        4_703_768,
    ),
    "tome": (lambda: costs.tome(PA, schedule=[4] * 6), 8_673_099),
    "tome_clamped": (lambda: costs.tome(PA, schedule=[40] * 6), 2_817_399),
    "tome_falling": (
        lambda: costs.tome(PB, schedule=[12, 9, 7, 4, 2, 0], proportional=False),
        3_885_333,
    ),
    "evo": (lambda: costs.evo_vit(PA, location=2, keep_rate=0.5), 6_795_658),
    "evo_late": (lambda: costs.evo_vit(PA, location=4, keep_rate=0.3), 8_113_158),
    "ats": (lambda: costs.ats(PA, tokens={3: 30}), 8_198_121),
    "ats_masked": (lambda: costs.ats(PA, tokens={3: 65}), 10_783_796),
    "ats_twice": (lambda: costs.ats(PA, tokens={2: 36, 4: 31}), 7_514_776),
    "act": (
        lambda: costs.act(PA, num_clusters=[14, 14, 13, 14, 9, 13], num_hashes=4),
        8_498_683,
    ),
    "smyrf": (
        lambda: costs.smyrf(PA, blocks=range(3, 6), num_hashes=4, cluster_size=13),
        10_505_719,
    ),
    "smyrf_straddling": (
        lambda: costs.smyrf(PA, blocks=range(2, 5), num_hashes=8, cluster_size=16),
        12_249_871,
    ),
}
TABLE = PublishedTable()


def shape_of(net) -> costs.Shape:
    """The sizes of one of timm's ViTs."""
    block = net.blocks[0]
    return costs.Shape(
        depth=len(net.blocks),
        width=net.embed_dim,
        num_heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        patch_size=net.patch_embed.patch_size[0],
        grid=tuple(net.patch_embed.grid_size),
        num_classes=net.head.out_features if isinstance(net.head, torch.nn.Linear) else 0,
        in_chans=net.patch_embed.proj.in_channels,
    )


@pytest.mark.parametrize("name", COUNTED)
def test_counts_of_the_published_counter(name):
    form, counted = COUNTED[name]
    tolerance = 5e-4 if name.startswith("ats") else 3e-5
    assert form().total == pytest.approx(counted, rel=tolerance)


@pytest.mark.parametrize(
    "idle",
    [
        costs.evit(PA, keep_rate=1.0, drop_blocks=[1, 3]),
        costs.evit(PA, keep_rate=0.99, drop_blocks=[1, 3], fuse_token=True),
        costs.evo_vit(PA, location=3, keep_rate=1.0),
        costs.evo_vit(PA, location=6, keep_rate=0.5),
        costs.tome(PA, schedule=[0] * 6),
    ],
)
def test_what_leaves_all_tokens_costs_what_the_net_does(idle):
    """Scores that nobody reads are no part of the published graph."""
    assert idle == costs.base(PA)


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({"location": 6, "iterations": 3}, 10_760_659),
        ({"location": 6, "iterations": 3, "after_output": True}, 10_760_659),
        ({"location": 5, "iterations": 3, "after_output": True}, 11_094_055),
        ({"location": 2, "iterations": 0, "num_clusters": 9}, 4_517_063),
    ],
)
def test_clustering_at_the_edges(options, counted):
    """Nowhere, behind the last block, and pooling alone, by the published counter on torch 2.14."""
    ours = costs.hourglass(PA, **{"num_clusters": 16, **options})
    assert ours.total == pytest.approx(counted, rel=3e-5)


def test_the_rows_are_46_and_every_fixed_one_is_within_a_tenth_of_a_percent():
    fixed = [row for row in ROWS if row.free is None]
    assert (len(ROWS), len(fixed)) == (46, 32)
    for row in fixed:
        assert TABLE.cost(row).total / 1e9 == pytest.approx(row.stated.gflops, rel=1e-3)


def test_the_other_rows_need_a_count_and_the_solved_one_gives_the_stated_figure():
    for row in (row for row in ROWS if row.free):
        assert TABLE.cost(row) is None
        ours = [TABLE.cost(row, [count]).total / 1e9 for count in row.free]
        assert ours[0] == pytest.approx(row.stated.gflops, rel=1e-3)
        assert ours[1:] == pytest.approx([row.stated.gflops] * 2, rel=1.1e-2)
        assert ours[1] < ours[0] < ours[2]


def tiny(**keywords):
    torch.manual_seed(0)
    return timm.create_model(
        "swag_vit_l16_in1k",
        **{"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 6, "num_heads": 4},
        **{"mlp_ratio": 2.0, "num_classes": 10},
        **keywords,
    ).eval()


@pytest.mark.parametrize(
    ("method", "options", "form"),
    [
        (BASE, {}, lambda: costs.base(PA)),
        (
            "hourglass",
            {"location": 2, "num_clusters": 16},
            lambda: costs.hourglass(PA, location=2, num_clusters=16),
        ),
        (
            "evit",
            {"keep_rate": 0.7, "locations": [1, 3, 5]},
            lambda: costs.evit(PA, keep_rate=0.7, drop_blocks=[1, 3, 5]),
        ),
        ("tome", {"r": 4}, lambda: costs.tome(PA, schedule=[4] * 6)),
        (
            "evo_vit",
            {"location": 2, "keep_rate": 0.5},
            lambda: costs.evo_vit(PA, location=2, keep_rate=0.5),
        ),
    ],
)
def test_the_nets_multiply_as_often_as_the_forms_say(method, options, form):
    """Products of the closed form and of torch's counter on our nets.

    Not to the last one: the published graph leaves out what nobody reads, as the last distances of
    the clustering.
    """
    net = tiny()
    if method != BASE:
        net = reduced(net, method=method, form="published", options=options).eval()
    counted = count_operations(net, torch.randn(1, 3, 32, 32), backward=False)
    assert not counted.uncounted
    assert counted.forward // 2 == pytest.approx(form().products, rel=1e-2)


def test_the_shape_of_a_net():
    assert shape_of(tiny()) == PA
    assert PA.num_tokens == 65 and PB.num_patches == 49


def test_costs_add_up():
    one = costs.Cost(3, 2)
    assert (one + one - one) == one and one.total == 5


def test_counts_are_taken_of_the_net(monkeypatch):
    """ACT: clusters of every block; ATS: the tokens behind its block."""
    act = next(row for row in ROWS if row.method == "act")
    ats = next(row for row in ROWS if row.method == "ats")
    monkeypatch.setattr("baselines.token_reduction.table._shape", lambda model: PA)
    image = torch.rand(1, 3, 32, 32)
    clusters = TABLE.measure(act, tiny(), image)
    assert len(clusters) == 6 and all(1 <= count <= 65 for count in clusters)
    assert TABLE.measure(act, tiny(), image) == clusters
    (left,) = TABLE.measure(ats._replace(options={"locations": [3]}), tiny(), image)
    assert 2 <= left <= 65


def test_weights_of_a_model_without_rows_are_refused():
    with pytest.raises(ValueError, match=r"no row is of 'swag_vit_b16_in1k'"):
        PublishedTable({"swag_vit_b16_in1k": "file.pth"})


def test_the_shapes_are_those_of_the_nets():
    for model in ("swag_vit_l16_in1k", "swag_vit_h14_in1k"):
        with torch.device("meta"):
            assert shape_of(timm.create_model(model)) == table._shape(model)
