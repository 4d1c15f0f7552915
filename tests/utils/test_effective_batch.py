"""The batch per step is kept, or refused with numbers that keep it."""

import re

import pytest

from utils.effective_batch import count_steps, micro_batches, shared_batches


@pytest.mark.parametrize(
    ("per_gpu", "processes", "steps"), [(128, 16, 1), (64, 32, 1), (64, 8, 4), (128, 1, 16)]
)
def test_accumulation_follows_from_the_effective_batch(per_gpu, processes, steps):
    assert micro_batches(2048, per_gpu, processes) == steps
    assert micro_batches(2048, per_gpu, processes, steps) == steps


def test_without_an_effective_batch():
    assert micro_batches(None, 48, 7) == 1 and micro_batches(None, 48, 7, 3) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((48, 16, None), "batch_size_per_gpu=32 accumulation=4 would keep it"),
        ((64, 32, 2), "batch_size_per_gpu=64 accumulation=1 would keep it"),
        ((64, 12, None), "8 processes could share it"),
        ((4096, 1, None), "batch_size_per_gpu=2048 accumulation=1 would keep it"),
    ],
)
def test_refused_with_numbers_that_keep_it(given, said):
    with pytest.raises(ValueError, match=said) as refusal:
        micro_batches(2048, *given)
    offered = re.search(r"batch_size_per_gpu=(\d+) accumulation=(\d+) would", str(refusal.value))
    if offered:
        size, steps = map(int, offered.groups())
        assert micro_batches(2048, size, given[1], steps) == steps
    other = re.search(r"effective_batch_size=(\d+) would", str(refusal.value))
    assert other and micro_batches(int(other[1]), *given) >= 1


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="batch_size_per_gpu must be a whole number from 1, not 0"):
        micro_batches(2048, 0, 1)
    with pytest.raises(ValueError, match="accumulation must be a whole number from 1, not 0"):
        micro_batches(2048, 8, 1, 0)
    for effective in (0, -16):  # which a share divides without a rest
        with pytest.raises(ValueError, match="effective_batch_size must be a whole number from 1"):
            micro_batches(effective, 8, 1)


@pytest.mark.parametrize(
    ("images", "at_most", "processes", "shared"),
    [(64, 64, 4, (16, 1)), (1024, 128, 8, (128, 1)), (1026, 128, 3, (114, 3)), (7, 3, 1, (1, 7))],
)
def test_a_step_shared_evenly(images, at_most, processes, shared):
    assert shared_batches(images, at_most, processes) == shared


def test_a_step_that_cannot_be_shared():
    with pytest.raises(ValueError, match="64 images .* by 3 processes; 63 images per step can"):
        shared_batches(64, 64, 3)
    with pytest.raises(ValueError, match="2 images .* by 4 processes; 4 images per step can"):
        shared_batches(2, 8, 4)


@pytest.mark.parametrize(
    ("epochs", "epoch_length", "images", "steps"),
    [(3, 0, 100, (3, 9)), (2.5, 4, 100, (4, 10)), (2, 0, 7, (1, 2))],
)
def test_steps_of_a_run(epochs, epoch_length, images, steps):
    """An epoch of no length is a pass over the images, without the tail that fills no batch."""
    assert count_steps(epochs, epoch_length, images=images, batch_size=32) == steps


@pytest.mark.parametrize("epochs", [0, -1, 0.1, float("inf")])
def test_a_run_without_a_step_is_refused(epochs):
    with pytest.raises(ValueError, match="epochs"):
        count_steps(epochs, 4, images=100, batch_size=32)
