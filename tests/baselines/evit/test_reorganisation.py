"""Counts are exact, tokens go where they should, and a fused token is never taken for a patch."""

import pytest
import torch

from baselines.evit.reorganisation import (
    FUSED,
    follow_origins,
    patch_indices,
    patch_mask,
    scatter_tokens,
    tokens_to_keep,
)
from baselines.evit.schedule import Shrink


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
