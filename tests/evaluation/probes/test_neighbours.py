"""Streaming search is exact search, whatever the chunks; the vote is the sum it claims to be."""

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from evaluation.probes.neighbours import (
    Neighbours,
    choose_rows,
    classify,
    find_neighbours,
    merge_neighbours,
    vote,
)


@pytest.fixture
def rows() -> torch.Tensor:
    return normalize(torch.randn(301, 12), dim=-1)


@pytest.fixture
def queries() -> torch.Tensor:
    return normalize(torch.randn(23, 12), dim=-1)


@pytest.mark.parametrize(("chunk_size", "query_batch"), [(1, 23), (7, 5), (64, 1), (1000, 1000)])
def test_streaming_equals_brute_force(rows, queries, chunk_size, query_batch):
    expected = (queries @ rows.T).topk(20)
    found = find_neighbours(queries, rows, k=20, chunk_size=chunk_size, query_batch=query_batch)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.similarities, expected.values)


def test_parts_merge_to_the_whole(rows, queries):
    """What several ranks find among their own rows is, cut again, what one finds among all."""
    shares = [torch.arange(len(rows))[rank::3] for rank in range(3)]
    parts = [find_neighbours(queries, rows[share], k=9, indices=share) for share in shares]
    expected = find_neighbours(queries, rows, k=9)
    assert torch.equal(merge_neighbours(parts, 9).indices, expected.indices)


def test_equal_rows_are_ordered_by_index(rows):
    doubled = torch.cat([rows, rows])
    found = find_neighbours(rows[:5], doubled, k=2, chunk_size=50)
    expected = torch.arange(5)[:, None] + torch.tensor([0, len(rows)])
    assert torch.equal(found.indices, expected)


def test_fewer_rows_than_k(rows, queries):
    found = find_neighbours(queries, rows[:4], k=10, chunk_size=3)
    assert found.indices.shape == (23, 4)
    assert torch.equal(found.indices.sort().values, torch.arange(4).expand(23, 4))


def test_half_precision_finds_nearly_the_same(rows, queries):
    exact = find_neighbours(queries, rows, k=10).indices
    found = find_neighbours(queries, rows.half(), k=10, precision="fp16").indices
    same = (found[:, :, None] == exact[:, None]).any(-1).float().mean()
    assert same > 0.95


def test_autocast_does_not_reach_the_search(rows, queries):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = find_neighbours(queries, rows, k=20)
    assert torch.equal(found.similarities, find_neighbours(queries, rows, k=20).similarities)


def test_unknown_precision_lists_the_known(rows, queries):
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16"):
        find_neighbours(queries, rows, k=1, precision="fp8")


def test_vote_is_the_weighted_sum_of_one_hot_labels(rows, queries):
    labels = torch.randint(6, (301,))
    found = find_neighbours(queries, rows, k=15)
    weights = (found.similarities / 0.1).softmax(1)[..., None] * one_hot(labels[found.indices], 6)
    scores = vote(found, labels, ks=[15, 1, 4], temperature=0.1, num_classes=6)
    for k, score in scores.items():
        torch.testing.assert_close(score, weights[:, :k].sum(1))


def test_classify_counts_hits():
    found = Neighbours(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([[0, 1], [1, 2]]))
    train_labels = torch.tensor([0, 1, 2])
    figures = classify(found, train_labels, torch.tensor([0, 2]), ks=[1, 2], temperature=0.1)
    assert figures[1][1] == 50.0
    assert figures[2][5] == 100.0  # top-5 of three classes is everything


def test_few_shot_rows_are_balanced_and_reproducible():
    labels = torch.randint(5, (200,))
    tries = list(choose_rows(labels, [3, 10], n_per_class=7, num_tries=3))
    again = list(choose_rows(labels, [3, 10], n_per_class=7, num_tries=3))
    assert len(tries) == 3
    for (rows, ks), (rows_again, _) in zip(tries, again, strict=True):
        assert ks == [3, 7]
        assert labels[rows].bincount().tolist() == [7] * 5
        assert torch.equal(rows, rows_again)
    assert not torch.equal(tries[0][0], tries[1][0])


def test_all_rows_are_one_try():
    """Which keeps the order of the k that was asked for."""
    assert list(choose_rows(torch.zeros(4), [9, 3, 3], n_per_class=-1, num_tries=5)) == [
        (None, [9, 3])
    ]
