"""Targets are probabilities, follow the batch of all ranks, and stay finite."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2 import centering
from dinov2.centering import EmaCenter, Targets, sinkhorn_knopp


def test_rows_sum_to_one_in_both_modes():
    logits = torch.randn(6, 10)
    for mode in centering.CENTERINGS:
        targets = Targets(10, centering=mode)(logits, 0.05)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_unknown_mode_lists_the_known_ones():
    with pytest.raises(ValueError, match="centering must be one of centering, sinkhorn_knopp"):
        Targets(10, centering="sinkhorn")


def test_the_centre_is_lagged_by_one_step():
    targets = Targets(4)
    logits = torch.randn(5, 4)
    first = targets(logits, 1.0)
    torch.testing.assert_close(first, logits.softmax(dim=1))
    assert torch.equal(targets.ema.center, torch.zeros(4))
    targets.update()
    torch.testing.assert_close(targets.ema.center, 0.1 * logits.mean(dim=0))
    torch.testing.assert_close(
        targets(logits, 1.0), (logits - 0.1 * logits.mean(dim=0)).softmax(dim=1)
    )


def test_micro_batches_move_the_centre_as_one_batch():
    logits = torch.randn(8, 4, dtype=torch.float64)
    whole, split = EmaCenter(4).double(), EmaCenter(4).double()
    whole.keep(logits)
    for part in logits.chunk(4):
        split.keep(part)
    whole.update()
    split.update()
    torch.testing.assert_close(whole.center, split.center)


def test_padding_and_empty_batches_do_not_move_the_centre():
    centre = EmaCenter(4)
    logits = torch.randn(3, 4)
    centre.keep(torch.full((2, 4), torch.inf), torch.zeros(2, dtype=torch.bool))
    centre.update()
    assert torch.equal(centre.center, torch.zeros(4))
    centre.keep(torch.cat([logits, 1e6 * logits]), torch.arange(6) < 3)
    centre.update()
    torch.testing.assert_close(centre.center, 0.1 * logits.mean(dim=0))


def test_only_the_centre_is_saved():
    assert list(Targets(4).state_dict()) == ["ema.center"]


def test_sinkhorn_equals_the_published_form_where_that_is_finite():
    logits, temperature = torch.randn(7, 5, dtype=torch.float64), 0.3
    q = torch.exp(logits / temperature).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True) * 5
        q /= q.sum(dim=0, keepdim=True) * 7
    torch.testing.assert_close(sinkhorn_knopp(logits, temperature), (q * 7).T)


@pytest.mark.parametrize("size", [4.0, 100.0])
def test_sinkhorn_stays_finite_with_large_logits(size):
    targets = sinkhorn_knopp(size * torch.randn(16, 12), 0.04)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(16))


def test_sinkhorn_shares_the_rows_evenly():
    targets = sinkhorn_knopp(torch.randn(60, 6) + torch.arange(6.0), 0.5, num_iterations=50)
    torch.testing.assert_close(targets.mean(dim=0), torch.full((6,), 1 / 6), atol=1e-3, rtol=0)


def test_sinkhorn_ignores_padding():
    logits = torch.randn(9, 6)
    padded = torch.cat([logits, torch.full((4, 6), 50.0)])
    found = sinkhorn_knopp(padded, 0.1, valid=torch.arange(13) < 9)
    torch.testing.assert_close(found[:9], sinkhorn_knopp(logits, 0.1))
    assert sinkhorn_knopp(padded, 0.1, valid=torch.zeros(13, dtype=torch.bool)).isfinite().all()
    assert sinkhorn_knopp(logits[:0], 0.1).shape == (0, 6)


@pytest.mark.parametrize("size", [0.1, 100.0])
def test_sinkhorn_in_pieces(size, monkeypatch):
    """Row by row it gives the same, and makes nothing as large as the result again and again."""
    logits, valid = size * torch.randn(7, 5), torch.arange(7) != 3
    whole = [sinkhorn_knopp(logits, 0.05), sinkhorn_knopp(logits, 0.05, valid=valid)]
    monkeypatch.setattr(centering, "PIECE", 11)  # two rows and a bit
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.05), whole[0])
    with Made() as made:
        found = sinkhorn_knopp(logits, 0.05, valid=valid)
    torch.testing.assert_close(found, whole[1])
    assert sorted(made.sizes)[-2:] == [10, 35]  # two rows, the scores


class Made(TorchDispatchMode):
    """Numbers of values of the tensors that operators made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.storages: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = tensor  # kept, so that no storage comes again
                self.sizes.append(tensor.numel())
        return out


def test_ranks_together_equal_one_process(monkeypatch):
    logits = torch.randn(10, 6)
    alone = Targets(6)
    alone(logits, 0.1)
    alone.update()
    expected = sinkhorn_knopp(logits, 0.1)
    ranks = FakeRanks(2)
    monkeypatch.setattr(centering, "all_reduce_max", lambda t: ranks.reduce(t).amax(dim=0))
    monkeypatch.setattr(centering, "all_reduce_mean", lambda t: ranks.reduce(t).mean(dim=0))

    def one(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = logits.chunk(2)[rank]
        targets = Targets(6)
        targets(part, 0.1)
        targets.update()
        return sinkhorn_knopp(part, 0.1), targets.ema.center

    results = ranks.run(one)
    torch.testing.assert_close(torch.cat([q for q, _ in results]), expected)
    for _, center in results:
        torch.testing.assert_close(center, alone.ema.center)


class FakeRanks:
    """Threads that meet in each collective."""

    def __init__(self, size: int) -> None:
        self.size, self.here = size, threading.local()
        self.slots: list = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.slots[self.here.rank] = tensor
        self.barrier.wait()
        stacked = torch.stack(self.slots)
        self.barrier.wait()
        return stacked

    def run(self, function) -> list:
        results: list = [None] * self.size

        def work(rank: int) -> None:
            self.here.rank = rank
            results[rank] = function(rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
