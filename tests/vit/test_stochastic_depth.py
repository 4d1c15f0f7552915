"""Branches are dropped for whole sequences, each group for itself, and keep their mean."""

import pytest
import torch
from torch import Tensor

from vit.packing import Packing, pack, unpack
from vit.stochastic_depth import MODES, add_branch, drop_path, drop_path_rates

GROUPS = ((6, 5), (4, 3), (3, 2))  # sequences, tokens of each
RATE = 0.4


def sums(x: Tensor, packing: Packing | None) -> Tensor:
    """A branch that tells which tokens it takes for one sequence: it gives each their sum."""
    if packing is None:
        return x.sum(dim=1, keepdim=True).expand_as(x)
    return torch.cat([sums(part, None).flatten(0, 1) for part in unpack(x, packing.groups)])[None]


def draw_factors(mode: str, *, packed: bool) -> list[Tensor]:
    """By what each token's branch was multiplied, for every group [sequences tokens]."""
    batches = [1 + torch.rand(*group, 1, dtype=torch.float64) for group in GROUPS]
    x, packing = pack(batches) if packed else (batches[0], None)
    found = add_branch(x, sums, packing, rate=RATE, mode=mode) - x
    factors = (found / sums(x, packing)).squeeze(-1)
    return [factors] if packing is None else unpack(factors, packing.groups)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_sequences_are_dropped_whole_and_equally_often(mode, packed):
    draws = [draw_factors(mode, packed=packed) for _ in range(300)]
    kept = []
    for group in zip(*draws, strict=True):
        factors = torch.stack(group)  # [draws sequences tokens]
        torch.testing.assert_close(factors, factors[..., :1].expand_as(factors))
        count, share = factors.shape[1], 1 - RATE
        kept.append(factors[..., 0] != 0)
        if mode == "subset":  # as many in every draw
            number = max(1, int(count * share))
            share = number / count
            assert (kept[-1].sum(dim=1) == number).all()
        torch.testing.assert_close(factors[kept[-1]] * share, torch.ones_like(factors[kept[-1]]))
        assert (kept[-1].double().mean(dim=0) - share).abs().max() < 0.1
    # No group repeats the draws of another one.
    assert not packed or not torch.equal(kept[0][:, :3], kept[1][:, :3])


def test_rates_are_even_or_rise_from_zero():
    assert drop_path_rates(0.3, 4, uniform=True) == [0.3] * 4
    assert drop_path_rates(0.3, 4, uniform=False) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1, uniform=False) == [0.0]


def test_a_branch_in_half_precision_is_divided_in_the_dtype_of_the_tokens():
    """Half precision would round the divisor."""
    update = torch.ones(64, 2, 3, dtype=torch.bfloat16)
    found = drop_path(update, None, 0.3, dtype=torch.float32)
    assert found.dtype == torch.float32
    kept = found[found != 0]
    assert 0 < len(kept) < found.numel()
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7), rtol=1e-5, atol=0)


def test_a_branch_that_is_always_dropped_adds_zero():
    update = torch.ones(4, 2, 3)
    assert torch.equal(drop_path(update, None, 1.0, dtype=update.dtype), torch.zeros(4, 2, 3))


def test_a_dropped_branch_in_half_precision_is_divided_exactly() -> None:
    update = torch.ones(50, 1, 8, dtype=torch.bfloat16)
    dropped = drop_path(update, None, 0.4, dtype=torch.float32)
    assert dropped.dtype == torch.float32
    assert set(dropped.unique().tolist()) == {0.0, (1 / torch.tensor(0.6)).item()}
