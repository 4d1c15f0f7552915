"""The default order shows every image once per pass; every order can start anywhere."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from utils.data.samplers import (
    SAMPLERS,
    derive_seed,
    distributed,
    epoch,
    infinite,
    rank_indices,
    repeated_augmentation,
    sharded_infinite,
    shuffled,
)

N = 600


def _take(count: int, **options: object) -> list[int]:
    options = {"sampler": "shuffled", "sample_count": N, "batch_size": 4, **options}
    return list(
        islice(rank_indices(options.pop("sampler"), options.pop("sample_count"), **options), count)
    )


def test_shuffled_is_a_new_permutation_per_pass() -> None:
    stream = list(islice(shuffled(N, seed=3), 3 * N))
    passes = [stream[i * N : (i + 1) * N] for i in range(3)]
    assert all(sorted(order) == list(range(N)) for order in passes)
    assert passes[0] != passes[1] != passes[2] != list(range(N))
    assert stream != list(islice(shuffled(N, seed=4), 3 * N))
    assert list(islice(shuffled(N, seed=3, first=700), 50)) == stream[700:750]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shuffled_ranks_share_one_order(world_size: int) -> None:
    """A step reads the same images however many ranks share it; each rank sees all over time."""
    steps, step_size = 200, 12
    batch_size = step_size // world_size
    ranks = [
        _take(steps * batch_size, batch_size=batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = np.array(ranks).reshape(world_size, steps, batch_size).transpose(1, 0, 2)
    assert together.flatten().tolist() == list(islice(shuffled(N, seed=0), steps * step_size))
    many = _take(8000, batch_size=batch_size, world_size=world_size, rank=world_size - 1)
    assert len(set(many)) == N


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_order_can_start_at_any_batch(sampler: str, world_size: int) -> None:
    options = {"sampler": sampler, "rank": world_size - 1, "world_size": world_size, "seed": 7}
    whole = _take(1200, **options)
    assert _take(1200, **options) == whole
    for first_batch in (1, 50, 149, 150, 151, 273):
        assert _take(40, first_batch=first_batch, **options) == whole[4 * first_batch :][:40]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_order_is_new_in_each_pass_and_shared_by_the_ranks(sampler: str) -> None:
    """Another seed gives another order, but for the published one that goes by the epoch alone."""
    repeats, length, world_size = sampler == "repeated_augmentation", 1024, 4
    options = {"sampler": sampler, "sample_count": length, "world_size": world_size}
    share = length // world_size
    ranks = [_take(2 * share, rank=rank, seed=7, **options) for rank in range(world_size)]
    for first, second in (ranks[0][:share], ranks[0][share:]), (ranks[1][:share], ranks[0][:share]):
        assert first != second
    assert all(len(set(own[:share])) == len(set(own[share:])) == share for own in ranks)
    seen = Counter(index for own in ranks for index in own[:share])
    assert max(seen.values()) == (3 if repeats else 1)
    assert (_take(2 * share, seed=8, **options)[share:] == ranks[0][share:]) == repeats


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fewer_images_than_a_batch(sampler: str) -> None:
    if sampler == "repeated_augmentation":
        with pytest.raises(ValueError, match="has nothing for a rank"):
            _take(20, sampler=sampler, sample_count=3)
        return
    assert set(_take(20, sampler=sampler, sample_count=3, batch_size=8)) == {0, 1, 2}


def test_epochs_drop_the_tail_that_fills_no_batch() -> None:
    stream = _take(12, sampler="epoch", sample_count=7, batch_size=3)
    assert len(set(stream[:6])) == len(set(stream[6:])) == 6


def test_too_few_images_for_the_ranks_are_said() -> None:
    for sampler in ("sharded_infinite", "infinite", "epoch"):
        with pytest.raises(ValueError, match="use sampler=shuffled"):
            _take(1, sampler=sampler, sample_count=2, rank=2, world_size=3)


def test_an_unknown_sampler_lists_the_known() -> None:
    with pytest.raises(ValueError, match="sampler must be one of shuffled, sharded"):
        _take(1, sampler="random")


def test_advance_as_published_counts_whole_passes_by_all_images() -> None:
    plain = list(islice(sharded_infinite(12, seed=5, rank=1, world_size=2), 60))
    assert (
        list(islice(sharded_infinite(12, seed=5, rank=1, world_size=2, advance=14), 6))
        == plain[8:14]
    )


def test_seeds_of_neighbours_differ() -> None:
    seeds = {derive_seed(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(ValueError, match="non-negative"):
        derive_seed(-1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("count", "world_size"), [(10, 1), (10, 4), (3, 8)])
def test_distributed_deals_every_image(shuffle: bool, count: int, world_size: int) -> None:
    parts = [
        distributed(count, shuffle=shuffle, seed=5, epoch=4, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {-(-count // world_size)}
    assert set(torch.cat(parts).tolist()) == set(range(count))


@pytest.mark.parametrize("new", [False, True])
def test_a_ranks_share_is_shuffled_by_a_generator_of_seed_rank_and_pass(new: bool) -> None:
    """As published: the share is of one permutation, the pass counts in steps of 2^24."""
    count, seed, rank, world_size = 23, 5, 1, 3
    first = torch.Generator().manual_seed(seed)
    share = torch.randperm(count, dtype=torch.int32, generator=first)[rank::world_size][:7].tolist()
    expected = []
    for number in range(3):
        generator = torch.Generator().manual_seed(seed + rank + number * 2**24)
        if new:
            expected += [share[i] for i in torch.randperm(7, generator=generator).tolist()]
            continue
        shuffled_share = share[:1]  # from inside out: each goes to a place, whose image to the end
        for index in range(1, 7):
            place = int(torch.randint(0, index + 1, (1,), generator=generator))
            shuffled_share.append(share[index])
            shuffled_share[place], shuffled_share[index] = share[index], shuffled_share[place]
        expected += shuffled_share
    options = {"seed": seed, "rank": rank, "world_size": world_size}
    assert list(islice(sharded_infinite(count, new=new, **options), 21)) == expected
    name = "sharded_infinite_new" if new else "sharded_infinite"
    assert _take(21, sampler=name, sample_count=count, **options) == expected


def test_one_generator_shuffles_all_passes_of_the_infinite_order() -> None:
    """The image of a place is drawn from those not yet shown; ranks take turns."""
    generator, expected = torch.Generator().manual_seed(4), []
    for _ in range(2):
        left = list(range(6))
        for index in range(6):
            place = int(torch.randint(index, 6, (1,), generator=generator))
            left[index], left[place] = left[place], left[index]
        expected += [left[1::2]]
    found = list(islice(infinite(6, seed=4, rank=1, world_size=2), 6))
    assert found == expected[0] + expected[1]


def test_epochs_go_by_the_product_of_seed_and_epoch() -> None:
    """As published; without a seed by the epoch, so that epoch 0 is the same for all seeds."""
    for seed, number, drawn in ((3, 2, 6), (0, 2, 2), (5, 0, 0), (0, 0, 0)):
        order = np.random.default_rng(drawn).choice(np.arange(10), 10, replace=False)
        found = epoch(10, 10, seed=seed, epoch=number, rank=1, world_size=3)
        assert found.tolist() == order[1::3].tolist()


def test_an_epoch_may_be_longer_than_the_data_or_shorter() -> None:
    counts = Counter(epoch(25, 10, seed=1, epoch=1).tolist())
    assert sum(counts.values()) == 25 and max(counts.values()) == 3
    assert len(set(epoch(4, 10, seed=1, epoch=1).tolist())) == 4


def test_copies_of_an_image_go_to_ranks_in_turn() -> None:
    ranks = [repeated_augmentation(512, epoch=2, rank=rank, world_size=3) for rank in range(3)]
    assert ranks[0].tolist() == ranks[1].tolist() == ranks[2].tolist() and len(ranks[0]) == 170
