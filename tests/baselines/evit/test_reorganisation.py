"""Counts are exact, tokens go where they should, and a fused token is never taken for a patch."""

import pytest
import torch

from baselines.evit.reorganisation import (
    FUSED,
    complement,
    follow_origins,
    most_important,
    patch_indices,
    patch_mask,
    reorganise,
    scatter_tokens,
    tokens_to_keep,
)
from baselines.evit.schedule import Shrink
from baselines.selection import keep_count


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


def test_which_rate_decides():
    """A call's rate counts in blocks that drop tokens alone; `tokens` counts in all."""
    assert tokens_to_keep(10, 0.5) == 5
    assert tokens_to_keep(10, 0.5, 0.8) == 8
    assert tokens_to_keep(10, 1.0, 0.5) == 10
    assert tokens_to_keep(10, 0.5, 1.0) == 10
    assert tokens_to_keep(10, 1.0, None, 4) == 4
    with pytest.raises(ValueError, match="11 tokens to be kept of 10"):
        tokens_to_keep(10, 0.5, None, 11)
    for rate in (0.0, 2.0, "high"):
        with pytest.raises(ValueError, match="keep_rate must"):
            tokens_to_keep(10, 0.5, rate)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 0), (2, 9)])
def test_complement(shape):
    """With any leading axes, the kept and the others are all there are; the others ascend."""
    kept = torch.rand(*shape[:-1], 9).argsort(dim=-1)[..., : shape[-1]]
    rest = complement(kept, 9)
    assert torch.equal(
        torch.cat([kept, rest], -1).sort(-1).values, torch.arange(9).expand(*shape[:-1], 9)
    )
    assert torch.equal(rest, rest.sort(-1).values)


def test_reorganised_tokens():
    """Class token, kept ones by importance, the weighted sum of the others; nothing else."""
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    importance = torch.rand(2, 5, dtype=torch.float64) / 5
    kept = most_important(importance, 2)
    assert torch.equal(kept, importance.argsort(dim=1, descending=True)[:, :2])
    rest = complement(kept, 5)
    for row in range(2):
        assert sorted([*kept[row].tolist(), *rest[row].tolist()]) == list(range(5))
        assert rest[row].tolist() == sorted(rest[row].tolist())
    out = reorganise(x, kept, importance, fuse=True)
    assert out.shape == (2, 4, 3)
    for row in range(2):
        torch.testing.assert_close(out[row, 0], x[row, 0])
        torch.testing.assert_close(out[row, 1:3], x[row, 1:][kept[row]])
        fused = sum(importance[row, i] * x[row, 1 + i] for i in rest[row])
        torch.testing.assert_close(out[row, 3], fused)
    assert torch.equal(reorganise(x, kept, importance, fuse=False), out[:, :3])


def test_a_kept_fused_token_is_no_patch():
    """The second stage keeps the fused token (index 2 of the 2 kept): it shows in no picture."""
    first, second = torch.tensor([[5, 0]]), torch.tensor([[2, 0]])
    found = patch_indices([first, second], fuse=True)
    assert [stage.tolist() for stage in found] == [[[5, 0]], [[FUSED, 5]]]
    mask = patch_mask(found[1], (2, 3))
    assert mask.flatten().nonzero().flatten().tolist() == [5]
    origins = follow_origins(
        follow_origins(torch.arange(6)[None], first, fuse=True), second, fuse=True
    )
    assert origins.tolist() == [[FUSED, 5, FUSED]]
    tokens = torch.arange(1.0, 4.0)[None, :, None]
    assert scatter_tokens(torch.zeros(1, 6, 1), tokens, origins).flatten().tolist() == [
        *(0, 0, 0, 0, 0, 2)
    ]


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 1), (8, 0.9531088913245536), (12, 0.65), (17, 0.3119259607988261), (18, 0.3)],
)
def test_published_schedule(step, rate):
    """Rows of the published function: 3 steps an epoch, from epoch 2 on, within 4 epochs to 0.3."""
    shrink = Shrink(start_epoch=2, epochs=4)
    assert shrink.rate_at(0.3, step, 3) == pytest.approx(rate, abs=1e-12)
    assert Shrink().rate_at(0.5, 0, 5) == 0.5
    lower = Shrink(start_epoch=2, epochs=4, highest=0.8)
    assert [lower.rate_at(0.3, number, 3) for number in (5, 6, 12, 18)] == pytest.approx(
        [1, 0.8, 0.55, 0.3], abs=1e-12
    )
    with pytest.raises(ValueError, match="at least 0"):
        Shrink(epochs=-1)
    with pytest.raises(ValueError, match="shrink_start_epoch must be a number, not 'late'"):
        Shrink(start_epoch="late")


@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
@pytest.mark.parametrize("start_epoch", [0, 1.5])
def test_a_shrinking_rate_never_rises(start_epoch, epochs):
    """Also where it begins or ends within an epoch: it stays at its end until the next one."""
    shrink = Shrink(start_epoch=start_epoch, epochs=epochs)
    rates = [shrink.rate_at(0.3, step, 8) for step in range(48)]
    assert rates == sorted(rates, reverse=True) and rates[-1] == 0.3 and rates[0] == 1
    ended = [rate for step, rate in enumerate(rates) if step >= 8 * (start_epoch + epochs)]
    assert ended == pytest.approx([0.3] * len(ended), abs=1e-12)
