"""In which order a rank sees the images.

The default order, `shuffled`, is a function of (seed, position): position p of the run, counted
over all ranks, is image `permutation(seed, p // N)[p % N]` of N, so every pass is a new permutation
of all images dealt over the ranks. The other orders are those of the DINOv2 and DeiT codes, index
for index; `distributed` is torch's DistributedSampler, which both take.

Letters: N images, R ranks, rank r.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DistributedSampler

from utils.ranges import check_word

SAMPLERS = (
    "shuffled",
    "sharded_infinite",
    "sharded_infinite_new",
    "infinite",
    "epoch",
    "distributed",
    "repeated_augmentation",
)


def rank_indices(
    sampler: str,
    sample_count: int,
    *,
    batch_size: int,
    first_batch: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Indices that `rank` reads from its batch number `first_batch` on, without end.

    Starting anywhere gives the same as starting at 0 and skipping. ValueError for an unknown
    sampler and for too few images.
    """
    check_word("sampler", sampler, SAMPLERS)
    if sampler == "shuffled":
        return _shuffled_rank(sample_count, seed, batch_size, first_batch, rank, world_size)
    first = first_batch * batch_size
    if sampler == "infinite":
        _need(sample_count // world_size, sampler, sample_count)
        order = infinite(sample_count, seed=seed, rank=rank, world_size=world_size)
        return islice(order, first, None)
    if sampler.startswith("sharded_infinite"):
        _need(sample_count // world_size, sampler, sample_count)
        passes, rest = divmod(first, sample_count // world_size)
        order = sharded_infinite(
            sample_count,
            seed=seed,
            rank=rank,
            world_size=world_size,
            new=sampler.endswith("new"),
            first_pass=passes,
        )
        return islice(order, rest, None)

    def one_epoch(number: int) -> np.ndarray | Tensor:
        if sampler == "repeated_augmentation":
            return repeated_augmentation(
                sample_count, epoch=number, rank=rank, world_size=world_size
            )
        if sampler == "distributed":
            return distributed(
                sample_count, seed=seed, epoch=number, rank=rank, world_size=world_size
            )
        return epoch(
            sample_count, sample_count, seed=seed, epoch=number, rank=rank, world_size=world_size
        )

    return _epochs(one_epoch, sampler, sample_count, batch_size, first_batch)


def shuffled(sample_count: int, *, seed: int, first: int = 0) -> Iterator[int]:
    """The default order over all ranks, from position `first` on."""
    for position in count(first):
        passes, offset = divmod(position, sample_count)
        yield int(_permutation(sample_count, seed, passes)[offset])


def derive_seed(*numbers: int) -> int:
    """A seed of 63 bits from non-negative integers, unrelated for neighbouring ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sharded_infinite(
    sample_count: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    new: bool = False,
    first_pass: int = 0,
    advance: int = 0,
) -> Iterator[int]:
    """DINOv2's sharded order: a rank keeps one share of the images, shuffled anew for every pass.

    `new` draws a pass by `torch.randperm` instead of the slow insertion shuffle. `advance` skips as
    published, which with several ranks lands at the wrong place, because a pass of a rank is N // R
    and not N long; `rank_indices` counts with `first_pass` instead.
    """
    first_pass += advance // sample_count
    passes = (
        _sharded_pass(sample_count, shuffle, seed, rank, world_size, new, number)
        for number in count(first_pass)
    )
    return islice((index for order in passes for index in order), advance % sample_count, None)


def infinite(
    sample_count: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    advance: int = 0,
) -> Iterator[int]:
    """DINOv2's infinite order: one generator for ever, each pass a permutation dealt to ranks."""
    return islice(_infinite(sample_count, shuffle, seed, rank, world_size), advance, None)


def epoch(
    size: int,
    sample_count: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> np.ndarray:
    """DINOv2's epoch order: `size` images per epoch over all ranks, int64 [ceil((size - r) / R)].

    As published, epoch 0 has the same order for every seed other than 0.
    """
    tiled = np.tile(np.arange(sample_count), -(-size // sample_count))
    if not shuffle:
        return tiled[:size][rank::world_size]
    generator = np.random.default_rng(seed * epoch if seed else epoch)
    return generator.choice(tiled, size, replace=False)[rank::world_size]


def distributed(
    sample_count: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """torch's DistributedSampler: an epoch of one rank, int64 [ceil(N / R)].

    Ranks get equally many, for which the first images of the order come again.
    """
    images: Any = range(sample_count)  # its length alone is asked for
    order: DistributedSampler[int] = DistributedSampler(
        images, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed
    )
    order.set_epoch(epoch)
    return torch.tensor(list(order))


def repeated_augmentation(
    sample_count: int,
    *,
    epoch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    repeats: int = 3,
) -> Tensor:
    """DeiT's repeated augmentation (Hoffer et al. 2020): an epoch of one rank, int64.

    Each image comes `repeats` times in a row, dealt to different ranks; the epoch is cut to about
    N / R. As published, the order depends on the epoch alone, and fewer than 256 images give none.
    """
    generator = torch.Generator().manual_seed(epoch)
    order = torch.arange(sample_count)
    if shuffle:
        order = torch.randperm(sample_count, generator=generator)
    order = order.repeat_interleave(repeats)
    padding = -len(order) % world_size
    order = torch.cat([order, order[:padding]])
    return order[rank::world_size][: sample_count // 256 * 256 // world_size]


@lru_cache(maxsize=4)
def _permutation(sample_count: int, seed: int, passes: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, passes))
    return torch.randperm(sample_count, generator=generator)


def _shuffled_rank(
    sample_count: int, seed: int, batch_size: int, first_batch: int, rank: int, world_size: int
) -> Iterator[int]:
    for batch in count(first_batch):
        first = (batch * world_size + rank) * batch_size
        yield from islice(shuffled(sample_count, seed=seed, first=first), batch_size)


def _sharded_pass(
    sample_count: int, shuffle: bool, seed: int, rank: int, world_size: int, new: bool, number: int
) -> list[int]:
    if not shuffle:
        return list(range(sample_count))[rank::world_size]
    size = sample_count // world_size
    whole = torch.randperm(
        sample_count, dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
    )
    share = whole[rank::world_size][:size]
    generator = torch.Generator().manual_seed(seed + rank + (number << 24))
    if new:
        return share[torch.randperm(size, generator=generator)].tolist()
    return _insertion_shuffle(share.tolist(), generator)


def _insertion_shuffle(values: list[int], generator: Generator) -> list[int]:
    result: list[int] = []
    for index, value in enumerate(values):
        place = _draw(0, index + 1, generator) if index else 0
        result.append(value)
        result[index], result[place] = result[place], value
    return result


def _infinite(
    sample_count: int, shuffle: bool, seed: int, rank: int, world_size: int
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = range(sample_count)
        stream = _fisher_yates(sample_count, generator) if shuffle else iter(order)
        yield from islice(stream, rank, None, world_size)


def _fisher_yates(sample_count: int, generator: Generator) -> Iterator[int]:
    order = list(range(sample_count))
    for index in range(sample_count):
        place = _draw(index, sample_count, generator)
        order[index], order[place] = order[place], order[index]
        yield order[index]


def _draw(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def _epochs(
    one_epoch: Callable[[int], np.ndarray | Tensor],
    sampler: str,
    sample_count: int,
    batch_size: int,
    first_batch: int,
) -> Iterator[int]:
    """Epoch after epoch, each without the tail that fills no batch, as the published loaders do."""
    length = len(one_epoch(0))
    _need(length, sampler, sample_count)
    batches = max(length // batch_size, 1)
    used = batches * batch_size if length >= batch_size else length
    first = first_batch * batch_size
    number, rest = divmod(first, used)
    stream = (int(index) for e in count(number) for index in one_epoch(e)[:used])
    return islice(stream, rest, None)


def _need(length: int, sampler: str, sample_count: int) -> None:
    if length == 0:
        raise ValueError(
            f"sampler {sampler} has nothing for a rank to read from {sample_count} images; "
            "use sampler=shuffled"
        )
