"""Counts are exact, and of the tokens that do not stay only the weighted sum is left."""

import pytest
import torch

from baselines.selection import keep_count, keep_tokens, most_important


@pytest.mark.parametrize(
    ("rate", "count", "exact", "published"),
    [(0.55, 100, 55, 56), (0.55, 180, 99, 100), (0.7, 196, 138, 138), (0.7, 10, 7, 7)],
)
def test_counts_are_exact_or_as_published(rate, count, exact, published):
    assert keep_count(rate, count) == exact
    assert keep_count(rate, count, exact=False) == published


def test_counts_of_the_published_table_do_not_depend_on_the_arithmetic():
    """Both roundings give the table's tokens, fused and not, at all its rates and resolutions."""
    for rate in (0.5, 0.6, 0.7, 0.8, 0.9):
        for start in (196, 289, 324, 361):
            for fused in (0, 1):
                counts = {}
                for exact in (True, False):
                    count, counts[exact] = start, []
                    for _ in range(3):
                        count = keep_count(rate, count, exact=exact) + fused
                        counts[exact].append(count)
                assert counts[True] == counts[False]


@pytest.mark.parametrize("num_prefix", [0, 1, 3])
def test_kept_tokens(num_prefix):
    """Prefix tokens, kept ones by importance, the weighted sum of the others; nothing else."""
    x = torch.randn(2, num_prefix + 5, 3, dtype=torch.float64)
    importance = torch.rand(2, 5, dtype=torch.float64) / 5
    kept = most_important(importance, 2)
    assert torch.equal(kept, importance.argsort(dim=1, descending=True)[:, :2])
    out = keep_tokens(x, kept, importance, num_prefix=num_prefix, fuse=True)
    assert out.shape == (2, num_prefix + 3, 3)
    prefix, others = x[:, :num_prefix], x[:, num_prefix:]
    for row in range(2):
        rest = sorted(set(range(5)) - set(kept[row].tolist()))
        assert torch.equal(out[row, :num_prefix], prefix[row])
        assert torch.equal(out[row, num_prefix:-1], others[row][kept[row]])
        fused = sum(importance[row, i] * others[row, i] for i in rest)
        torch.testing.assert_close(out[row, -1], fused)
    alone = keep_tokens(x, kept, importance, num_prefix=num_prefix, fuse=False)
    assert torch.equal(alone, out[:, :-1])


def test_the_fused_token_is_exact_under_autocast():
    x, importance = torch.randn(2, 6, 3), torch.rand(2, 5)
    kept = most_important(importance, 2)
    exact = keep_tokens(x, kept, importance, num_prefix=1, fuse=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(keep_tokens(x, kept, importance, num_prefix=1, fuse=True), exact)
