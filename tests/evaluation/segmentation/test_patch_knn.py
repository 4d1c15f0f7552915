"""The streamed search equals a plain one, whatever the chunks, passes and processes."""

import pytest
import torch

from evaluation.segmentation.fit_rows import FitRows
from evaluation.segmentation.patch_knn import DISTANCES, PatchKnn, vote
from evaluation.segmentation.standardize import Standardizer
from tests.evaluation.segmentation.toys import make_store, random_patches
from tests.evaluation.toys import in_processes
from utils.errors import UserError

CPU = torch.device("cpu")
TRAIN, VAL, TEST = (random_patches(40 * 4, seed=1), random_patches(8, seed=2), random_patches(24))


def rows_of(*parts, **settings):
    settings = {"ignore_labels": [3, 255], "standardizer": Standardizer(), **settings}
    return FitRows([make_store(*part, per_image=4) for part in parts], **settings)


def predict(knn, rows, key, per_image=4):
    store = make_store(*TEST, per_image=per_image)
    parts = list(knn.fit_and_predict(rows, store, key, device=CPU))
    places = [place for share, _ in parts for place in range(share.start, share.stop)]
    assert places == list(range(store.num_rows))
    numbers = store.numbers(torch.arange(store.num_rows))
    return numbers, torch.cat([labels for _, labels in parts])


def plain(distance, k, subsampling=1):
    """All distances at once; the mode of each pixel by sorting."""
    features, labels = (torch.cat(pair) for pair in zip(TRAIN, VAL, strict=True))
    keep = labels.mode(1).values
    keep = ~torch.isin(keep, torch.tensor([3, 255], dtype=torch.uint8))
    keep &= torch.arange(len(labels)) % subsampling == 0
    features, labels = features[keep], labels[keep]
    queries = TEST[0]
    if distance == "cosine":
        queries, features = (torch.nn.functional.normalize(x, dim=1) for x in (queries, features))
    powers = {"L2": 2.0, "L1": 1.0, "Linf": torch.inf}
    if distance in powers:
        distances = torch.cdist(queries.double(), features.double(), p=powers[distance])
    else:
        distances = -(queries.double() @ features.double().T)
    nearest = distances.argsort(1)[:, :k]
    return labels[nearest].mode(1).values


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_equals_a_plain_search(distance, k):
    knn = PatchKnn(num_neighbors=[k], distances=[distance], query_batch=5)
    for chunk_size in (7, 1000):
        _, found = predict(
            knn,
            rows_of(TRAIN, VAL, chunk_size=chunk_size),
            f"num_neighbors={k}_distance={distance}",
        )
        assert torch.equal(found, plain(distance, k))


def test_several_passes_and_subsampling():
    """Queries that do not fit at once make several passes; every third training patch counts."""
    key = "num_neighbors=10_distance=L2"
    small = PatchKnn(query_gb=4 * 6 * 4 * 2 / 1e9, query_batch=4)
    _, found = predict(small, rows_of(TRAIN, VAL, subsampling=3), key)
    assert torch.equal(found, plain("L2", 10, subsampling=3))


def test_grid_is_one_search_per_distance():
    """The score of each point equals that of its own predictions."""
    knn = PatchKnn(num_neighbors=[1, 3, 10])
    rows, store = rows_of(TRAIN), make_store(*TEST, per_image=4)
    scores = knn.score(rows, store, device=CPU)
    assert list(scores) == list(knn.points)
    for key, score in scores.items():
        alone = PatchKnn(num_neighbors=[knn.points[key][0]], distances=[knn.points[key][1]])
        assert alone.score(rows, store, device=CPU)[key] == score


def test_vote_counts_every_prefix():
    labels = torch.randint(3, (50, 12, 4), dtype=torch.uint8)
    for k, found in vote(labels, [1, 2, 5, 12]).items():
        assert torch.equal(found, labels[:, :k].mode(1).values), k


def test_more_neighbours_than_patches(capsys):
    knn = PatchKnn(num_neighbors=[1, 500], distances=["L2"])
    rows = rows_of(TRAIN)
    _, found = predict(knn, rows, "num_neighbors=500_distance=L2")
    assert f"k = 500 asked, all {rows.count} training patches vote" in capsys.readouterr().out
    assert bool((found == found[:1]).all())


def test_bf16_finds_clusters():
    exact, rounded = (
        PatchKnn(num_neighbors=[10], search_precision=precision) for precision in ("fp32", "bf16")
    )
    store = make_store(*TEST, per_image=4)
    for key in exact.points:
        pair = [knn.score(rows_of(TRAIN), store, device=CPU)[key].acc for knn in (exact, rounded)]
        assert pair[0] == pytest.approx(pair[1], abs=0.1)


def _searched():
    found = {}
    for precision, distances in (("fp32", DISTANCES), ("bf16", ["cosine", "L2"])):
        for distance in distances:
            knn = PatchKnn(
                num_neighbors=[3],
                distances=[distance],
                query_batch=5,
                search_precision=precision,
                query_gb=3 * 4 * 6 * 4 / 1e9,
            )
            rows = rows_of(TRAIN, VAL, chunk_size=9, subsampling=2)
            numbers, labels = predict(knn, rows, f"num_neighbors=3_distance={distance}")
            score = knn.score(rows, make_store(*TEST, per_image=4), device=CPU)
            found[f"{distance} {precision}"] = [
                dict(zip(map(str, numbers.tolist()), labels.tolist(), strict=True)),
                [value.miou for value in score.values()],
            ]
    return found


@pytest.mark.slow
def test_processes_find_the_same(tmp_path):
    """Two ranks: each predicts its own queries as one process does."""
    alone = _searched()
    ranks = in_processes(_searched, 2, tmp_path)
    for key, (predictions, score) in alone.items():
        together: dict = {}
        for rank in ranks:
            together |= rank[key][0]
            assert rank[key][1] == score
        assert together == predictions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_neighbors": [0]}, "num_neighbors must be finite and at least 1, not 0"),
        (
            {"distances": ["L3"]},
            "distances must be one of cosine, L2, L1, Linf, ",
        ),
        ({"distances": []}, "distances must be a list of cosine, L2"),
        ({"search_precision": "fp8"}, "search_precision must be one of fp32, bf16"),
        ({"chunk_size": 0}, "chunk_size must be a whole number from 1"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(ValueError, match=message):
        PatchKnn(**settings)


def test_no_patch_to_learn_from():
    with pytest.raises(UserError, match="the labels 0, 1, 2, 3, 4 are ignored"):
        rows_of(TRAIN, ignore_labels=range(5))
