"""The pure functions of the seven methods: the law that each one promises."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.selection import rows_of
from baselines.token_reduction import act, ats, clustering, evit, evo_vit, smyrf, tome
from baselines.token_reduction.hashing import Draws
from baselines.token_reduction.options import FORMS
from baselines.token_reduction.presets import make_reducer
from baselines.token_reduction.reduced import Reduced
from baselines.token_reduction.reducer import State
from tests.baselines.token_reduction.toys import DEPTH, images, net_of, reduced


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ToMe.


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("num_tokens", [8, 23, 24])
def test_prefix_tokens_stay_in_front_alone_and_in_order(num_tokens, num_prefix):
    metric = draw(2, num_tokens, 6)
    metric[:, :num_prefix] = 1.0  # as like each other as tokens can be
    matching = tome.match_bipartite(
        metric, 99, protected_even=(num_prefix + 1) // 2, protected_odd=num_prefix // 2
    )
    merged = (num_tokens - num_prefix) // 2
    names = torch.arange(num_tokens, dtype=torch.float64).expand(2, -1)[..., None]
    size = tome.merge(matching, torch.ones_like(names), "sum")
    out = tome.merge(matching, names, "sum")
    assert out.shape[1] == num_tokens - merged
    assert torch.equal(out[:, :num_prefix], names[:, :num_prefix])
    assert (size[:, :num_prefix] == 1).all() and (size.sum(1) == num_tokens).all()


@pytest.mark.parametrize("mode", tome.MODES)
def test_merging_equal_tokens_and_back_changes_nothing(mode):
    """Of sources that equal their targets, mean and largest value are the tokens themselves."""
    matching = tome.match_bipartite(draw(2, 15, 6), 5, protected_even=1)
    labels = draw(2, 10, 3)
    x = tome.unmerge(matching, labels)
    merged = tome.merge(matching, x, mode)
    if mode != "sum":
        torch.testing.assert_close(merged, labels)
    torch.testing.assert_close(tome.unmerge(matching, labels), x)
    places = tome.merged_places(matching)
    assert torch.equal(rows_of(labels, places), x)


def test_a_kth_matching_covers_all_tokens():
    metric = draw(2, 24, 6)
    matching = tome.match_every_kth(metric, 4)
    ones = torch.ones(2, 24, 1, dtype=torch.float64)
    assert (tome.merge(matching, ones, "sum").sum(1) == 24).all()
    assert tome.unmerge(matching, tome.merge(matching, metric, "mean")).shape == metric.shape
    assert tome.match_bipartite(metric, 0) is None
    assert tome.unmerge(tome.match_every_kth(metric, 5), draw(2, 4, 6)).shape[1] == 20
    assert tome.match_every_kth(metric, 1) is None


def test_sizes_count_patches_and_sources_name_them():
    wrapped = reduced("dinov2", "tome", trace_source=True)
    found = wrapped.inspect(images()).record
    assert (found["size"].sum(dim=(1, 2)) == 68).all()
    torch.testing.assert_close(found["source"].sum(dim=2, keepdim=True), found["size"])
    assert torch.equal(found["source"][:, :4, :4], torch.eye(4).expand(3, -1, -1))


def test_schedules():
    assert tome.make_schedule(4, 3) == [4, 4, 4]
    assert tome.make_schedule(6, 6, -1.0) == [12, 9, 7, 4, 2, 0]
    assert tome.make_schedule([5, 1], 4) == [5, 1, 0, 0]
    with pytest.raises(ValueError, match="schedule of 3 blocks for a network of 2"):
        tome.make_schedule([1, 1, 1], 2)


def test_proportional_attention_is_attention_to_all_copies():
    """A key that stands for s patches draws what s equal keys would."""
    q, k, v = (draw(1, 2, 5, 4, seed=i) for i in range(3))
    size = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    copies = size.long()
    state = State(1, (2, 2), key_bias=size.log()[None, None, None])
    ours = tome.ToMe.softmax_attention(state, q, k, v)
    spread = [x.repeat_interleave(copies, dim=2) for x in (k, v)]
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, *spread))


@pytest.mark.parametrize("host", ["ours", "pooled"])
def test_equal_patches_are_merged_without_a_trace(host):
    """Attention, and a mean, count them as often as they were; without sizes they count once."""
    net = net_of(host)
    torch.nn.init.zeros_(net.pos_embed)
    columns = images().unflatten(-1, (4, 2, 4))
    x = columns[..., :1, :].expand_as(columns).flatten(-3).double()  # each patch beside its equal
    logits, gaps = net.double()(x), {}
    for proportional in (True, False):
        merging = tome.ToMe([0, 10], proportional=proportional)
        wrapped = Reduced(net, merging).eval()
        assert wrapped.inspect(x).tokens.shape[1] == 55
        gaps[proportional] = float((wrapped(x) - logits).detach().abs().max())
    assert gaps[True] < 1e-6 and gaps[False] > 1e-3


# Hourglass.


def test_as_many_clusters_as_patches_without_steps_is_the_network():
    net = net_of("ours")
    wrapped = reduced("ours", "hourglass", num_clusters=64, iterations=0)
    assert torch.equal(wrapped(images()), net(images()))


@pytest.mark.parametrize("clusters", [(3, 4), (2, 2), (6, 10)])
def test_clusters_are_means_of_their_neighbourhood(clusters):
    """Shares of a centroid sum to 1: constant features stay, and far patches have no part."""
    grid = (6, 10)
    x = draw(2, 60, 5)
    x[..., 0] = 7.0
    centroids = clustering.cluster_tokens(x, grid, clusters, window=3)
    labels = clustering.nearest_clusters(x, centroids)
    torch.testing.assert_close(centroids[..., 0], torch.full_like(centroids[..., 0], 7.0))
    assert centroids.shape == (2, clusters[0] * clusters[1], 5) and labels.shape == (2, 60)
    far = x.clone()
    far[:, -1] += 1  # the last patch may join the last centroids alone
    centroids, moved = (
        clustering.cluster_tokens(y, grid, clusters, window=3, iterations=1) for y in (x, far)
    )
    assert torch.equal(moved[:, 0], centroids[:, 0]) == (clusters != (2, 2))


def test_initial_labels_follow_the_frameworks_rounding():
    labels = clustering.initial_labels((44, 1), (26, 1))
    integer = torch.arange(44) * 26 // 44
    assert not torch.equal(labels, integer)


@pytest.mark.parametrize("nearest", [-1, 1, 3, 99])
def test_reconstruction_is_a_mean_whatever_the_distance(nearest):
    """Constant clusters give the constant back; the published form loses far patches."""
    before, after = 50 * draw(2, 20, 6), draw(2, 8, 6, seed=1)
    ones = torch.ones(2, 8, 3, dtype=torch.float64)
    found = clustering.reconstruct_tokens(before, after, ones, nearest=nearest)
    torch.testing.assert_close(found, torch.ones_like(found))
    published = clustering.reconstruct_tokens(
        before, after, ones, nearest=nearest, normalisation="l2"
    )
    assert (published == 0).any()


@pytest.mark.parametrize(("nearest", "count"), [(0, 1), (1, 1), (3, 3), (-1, 8), (99, 8)])
def test_reconstruction_weighs_clusters_by_their_distance(nearest, count):
    """exp(-temperature |before - after|^2) of the nearest ones, over its sum; no others count."""
    before, after = draw(2, 20, 6), draw(2, 8, 6, seed=1)
    names = torch.eye(8, dtype=torch.float64).expand(2, -1, -1)
    found = clustering.reconstruct_tokens(before, after, names, nearest=nearest, temperature=0.3)
    squares = torch.cdist(before, after).square()
    near = squares <= squares.sort(dim=2).values[..., count - 1 : count]
    weights = torch.exp(-0.3 * squares) * near
    torch.testing.assert_close(found, weights / weights.sum(dim=2, keepdim=True))


def test_temperatures_of_the_hourglass_at_their_ends():
    """Of the way back: the nearest cluster alone counts; of clustering: all patches count alike."""
    alone, hard = (
        reduced("ours", "hourglass", **options).features(images())[0].patches
        for options in ({"nearest": 1}, {"reconstruction_temperature": 1e6})
    )
    torch.testing.assert_close(hard, alone)
    record = reduced("ours", "hourglass", temperature=1e-9, window=99).inspect(images()).record
    mean = record["cluster.input"].mean(dim=1, keepdim=True)
    torch.testing.assert_close(record["cluster.centroids"], mean.expand(-1, 16, -1))


def test_bad_options_of_the_hourglass_are_one_line():
    cases = {
        "no square number; 9 and 16 are": lambda: clustering.Hourglass(1, 12),
        "window 4 must be odd": lambda: clustering.Hourglass(window=4),
        "iterations": lambda: clustering.Hourglass(iterations=-1),
        "reconstruction must be one of": lambda: clustering.Hourglass(reconstruction="l1"),
        "9 x 9 clusters of 8 x 8": lambda: reduced("ours", "hourglass", num_clusters=81)(images()),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
    wrapped = reduced("ours", "hourglass", num_clusters=None)
    assert wrapped.inspect(images()).tokens.shape[1] == 1 + 6 * 6  # half of 64 patches


# EViT and Evo-ViT.


@pytest.mark.parametrize(("form", "kept"), [("sound", 55), ("published", 56)])
def test_a_share_of_tokens_is_exact_or_as_published(form, kept):
    """As in EViT's own network: a rounding error adds no token but in the published form."""
    net = net_of("timm", img_size=40)
    options = {"keep_rate": 0.55, "locations": [1], "fuse_token": False}
    wrapped = Reduced(net, make_reducer("evit", form, **options)).eval()
    assert wrapped.inspect(images(1, 40)).record["block1.kept"].shape == (1, kept)


def test_both_scores_read_the_same_attention():
    q, k, v = (draw(2, 3, 7, 4, seed=seed) for seed in range(3))
    attention = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    state, scores = State(1, (2, 3)), {"class": attention[:, :, 0].mean(dim=1)}
    scores["all"] = attention.mean(dim=(1, 2))
    for score, expected in scores.items():
        found = evit.EViT(score=score).attend(state, 0, q, k, v, normed=q)
        torch.testing.assert_close(found.scores, expected)
        torch.testing.assert_close(found.out, attention @ v)


def test_evo_vit_loses_nothing():
    """Every patch is carried at the end, each by another token."""
    for fast in (True, False):
        found = reduced("dinov2", "evo_vit", fast_update=fast).inspect(images())
        places = found.origin.flatten(1).sort(dim=1).values
        assert torch.equal(places, torch.arange(4, 68).expand(3, -1))


def test_a_representative_of_equal_patches_is_that_patch():
    x = draw(2, 1, 4).expand(-1, 6, -1)
    found = evo_vit.representative(x, draw(2, 6, seed=1).exp())
    torch.testing.assert_close(found, x[:, :1])


# ATS.


def test_attention_to_live_tokens_alone_sums_to_one():
    q, k = draw(2, 3, 7, 4), draw(2, 3, 7, 4, seed=1)
    live = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    found = ats.masked_attention(q, k, live)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    assert found[1, :, :4, 4:].max() < 1e-6
    assert (ats.masked_attention(q, k, live, overlook=True)[1, :, :4, 4:] == 0).all()
    whole = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    torch.testing.assert_close(found[:1], whole[:1], rtol=1e-4, atol=1e-6)


def test_samples_are_a_budget_and_the_best_is_always_picked():
    scores = draw(3, 64).softmax(dim=1).sort(dim=1).values
    for samples in (1, 5, 20, 64):
        picked = ats.sample_places(scores, samples)
        assert (picked.sum(1) <= samples).all() and (picked.sum(1) >= 1).all()
        if samples > 1:
            assert picked[:, -1].all()
    even = torch.full((1, 64), 1 / 64, dtype=torch.float64)
    assert ats.sample_places(even, 64).sum() >= 63  # all but the one where the sum begins


def test_half_precision_samples_as_many():
    """In bfloat16 the sums of hundreds of near-equal scores would fall on the same few values."""
    q, k, v = (draw(1, 3, 577, 64, seed=i).bfloat16() * 0.3 for i in range(3))
    picked = {}
    for dtype in (torch.bfloat16, torch.float32):
        attention = ats.masked_attention(q.to(dtype), k.to(dtype), None)
        scores = ats.significance(attention, v.to(dtype), num_prefix=1)
        picked[dtype] = int(ats.sample_places(scores.sort(dim=1).values, 576).sum())
    assert picked[torch.bfloat16] > 0.95 * picked[torch.float32]


@pytest.mark.parametrize("host", ["ours", "pooled"])
@pytest.mark.parametrize("residual", ats.RESIDUALS)
def test_shortened_and_standing_sequences_agree(host, residual):
    """drop_tokens changes shapes and nothing else."""
    first = reduced(host, "ats", residual=residual).double()
    second = reduced(host, "ats", residual=residual, drop_tokens=False).double()
    x = images().double()
    torch.testing.assert_close(first(x), second(x), rtol=1e-6, atol=1e-7)
    ours, theirs = first.features(x)[0], second.features(x)[0]
    torch.testing.assert_close(ours.patches, theirs.patches, rtol=1e-6, atol=1e-6)
    for bad in (0, 1.5):
        with pytest.raises(ValueError, match="num_samples"):
            ats.AdaptiveSampling(num_samples=bad)


def test_options_without_meaning_are_refused():
    """A negative temperature would prefer the farthest token; each says what would be right."""
    for make, said in (
        (lambda: clustering.Hourglass(temperature=-1.0), "and above 0, not -1.0"),
        (lambda: clustering.Hourglass(reconstruction_temperature=0.0), "and above 0, not 0.0"),
        (lambda: evo_vit.EvoViT(tradeoff=1.5), r"tradeoff must lie in \[0, 1\], not 1.5"),
        (lambda: tome.ToMe(2.5), "r must be a whole number from 0, not 2.5"),
        (lambda: tome.ToMe(-1), "r must be a whole number from 0, not -1"),
        (lambda: tome.ToMe(2, inflection=2.0), r"inflection must lie in \[-1, 1\], not 2.0"),
    ):
        with pytest.raises(ValueError, match=said):
            make()


# ACT and SMYRF.


def test_every_token_its_own_cluster_is_attention():
    q, k, v = (draw(4, 9, 5, seed=i) for i in range(3))
    own = torch.arange(9).expand(4, -1)
    found = act.clustered_attention(q, k, v, query_ids=own, key_ids=own)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, scale=1.0))


def test_equal_tokens_share_a_cluster_without_loss():
    which = torch.tensor([[0, 1, 2, 1, 0, 2, 2]] * 3)
    q, k, v = (rows_of(draw(3, 3, 5, seed=i), which.expand(3, -1)) for i in range(3))
    found = act.clustered_attention(q, k, v, query_ids=which, key_ids=which)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, scale=1.0))


def test_only_equal_rows_share_a_fingerprint():
    """The published word lets a bucket beyond 3 spill into its neighbour's bits."""
    buckets = torch.tensor([[[4, 0], [0, 1], [4, 0]]])
    assert act.cluster_ids(act.packed_keys(buckets)).tolist() == [[0, 0, 0]]
    ids = act.cluster_ids(act.fingerprint_keys(buckets))[0].tolist()
    assert ids[0] == ids[2] != ids[1]
    many = torch.randint(0, 6, (2, 200, 40), generator=torch.Generator().manual_seed(0))
    assert int(act.cluster_ids(act.fingerprint_keys(many)).max()) == 199
    with pytest.raises(ValueError, match="at most 32"):
        act.ClusteredAttention(query_hashes=40, form="published")
    act.ClusteredAttention(key_hashes=40, form="published")  # keys are not hashed


def test_distance_alone_tells_tokens_apart():
    """The shift covers a bucket, so that a hash parts two tokens as often in any place."""
    reducer, names = act.ClusteredAttention(), [str(number) for number in range(1500)]
    reducer.draws.prepare(names, 4, 1)
    places = torch.tensor([-20.0, -1.0, 0.0, 2.0, 5.0, 40.0])
    pairs = F.pad(torch.stack([places, places + 2], dim=1)[..., None], (0, 3))
    ids = torch.stack([reducer.group(pairs, name, 1) for name in names])
    parted = (ids[..., 0] != ids[..., 1]).double().mean(dim=0)
    expected = 2 * (2 / torch.pi) ** 0.5 / act.BUCKET  # their mean distance on a line, of a bucket
    torch.testing.assert_close(parted, torch.full_like(parted, expected), rtol=0, atol=0.035)


@pytest.mark.parametrize("form", FORMS)
def test_prefix_tokens_are_alone_in_their_clusters(form):
    """Of queries and of keys; as published they are clustered like any other token."""
    record = reduced("dinov2", "act", form=form, query_hashes=1, key_hashes=1).inspect(images())
    for name in ("block2.q.groups", "block5.k.groups"):
        groups = record.record[name]
        shared = (groups[:, :4, None] == groups[:, None]).sum(dim=2) > 1
        assert shared.any() == (form == "published")


def test_one_cluster_of_all_tokens_is_attention():
    """SMYRF with clusters as large as the sequence, padded or not, is exact."""
    for size in (65, 80):
        wrapped = reduced("ours", "smyrf", query_cluster_size=size).double()
        x = images().double()
        torch.testing.assert_close(wrapped(x), wrapped.net(x), rtol=1e-7, atol=1e-8)


def test_sphere_of_smyrf():
    """All lifted queries and keys have one length, and their products are the ordinary ones."""
    q, k = draw(3, 8, 5), draw(3, 6, 5, seed=1)
    lifted_q, lifted_k = smyrf.lift(q, k)
    lengths = torch.cat([lifted_q, lifted_k], dim=1).norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:, :1].expand(-1, 14))
    torch.testing.assert_close(lifted_q @ lifted_k.mT, q @ k.mT)


def test_sizes_that_cannot_be_cut_are_one_line():
    with pytest.raises(ValueError, match="without a rest"):
        reduced("ours", "smyrf", form="published", query_cluster_size=14)(images())
    with pytest.raises(ValueError, match="are not as many clusters"):
        reduced("ours", "smyrf", query_cluster_size=8, key_cluster_size=16)(images())
    with pytest.raises(ValueError, match="the network has 6"):
        reduced("ours", "smyrf", start=2, stop=9)


@pytest.mark.parametrize("method", ["act", "smyrf"])
def test_projections_stay_or_are_drawn_anew(method):
    x = images()
    kept, same = reduced("ours", method), reduced("ours", method)
    assert torch.equal(kept(x), kept(x)) and torch.equal(kept(x), same(x))
    assert not torch.equal(kept(x), reduced("ours", method, seed=1)(x))
    fresh = reduced("ours", method, seed=None)
    assert not torch.equal(fresh(x), fresh(x))
    assert Draws(None).get("block0", 4, 3, x)[0].shape == (4, 3)


def test_evo_vit_shows_class_attention_where_it_keeps_all_tokens():
    """Opened to look inside; a call leaves the blocks as they are."""
    net, wrapped = net_of("hybrid"), reduced("hybrid", "evo_vit", keep_rate=1.0)
    record = wrapped.inspect(images()).record
    for index in range(2, DEPTH):
        rows = record[f"block{index}.class_attention"]
        assert rows.shape == (3, 64) and (rows > 0).all() and (rows.sum(1) < 1).all()
    torch.testing.assert_close(wrapped.inspect(images()).logits, net(images()))
    assert torch.equal(wrapped(images()), net(images()))
