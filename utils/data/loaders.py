"""Batches of images, for training without end and for evaluation once over.

A training batch is a function of (seed, step, micro-batch, rank) alone, the random augmentation
included: before each sample the generators of torch (CPU), numpy and random are seeded from (seed,
position of the sample in the run). So the number of workers changes nothing, a run may start at any
step, and one process reads the samples that several would share.
"""

import atexit
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from utils.data.images import ImageDataset
from utils.data.samplers import SAMPLERS, rank_indices
from utils.data.sources import (
    Collate,
    EvaluationSource,
    Failure,
    Request,
    TrainingSource,
    Transform,
)
from utils.errors import UserError
from utils.ranges import check_count, check_word
from utils.signals import STOP_SIGNALS

ON_ERROR = ("raise", "skip")
# Part of every seed, so that those of samples, collation (masks) and evaluation never coincide.
SAMPLE, COLLATE, EVALUATION = 1, 2, 3

logger = logging.getLogger(__name__)

# What a user may set instead: in a recipe, or for the heads of a probe; for a probe's features.
TAKES_THE_NEXT = (
    "recipe.on_error=skip, or probes.NAME.on_error=skip of a probe, takes the next image"
)
LEAVES_IT_OUT = "probes.NAME.on_error=skip, or on_error=skip of extracted features, leaves it out"


def check_loading(
    *, sampler: str = "shuffled", num_workers: int = 0, on_error: str = "raise", seed: int = 0
) -> None:
    """ValueError for bad options of a loader; recipes call it early, in their constructors."""
    check_count("num_workers", num_workers)
    check_count("seed", seed)
    check_word("sampler", sampler, SAMPLERS)
    check_word("on_error", on_error, ON_ERROR)


class TrainingBatches:
    """Iterator over training batches; `errors` counts the skipped images met so far, by file."""

    def __init__(self, batches: Iterator[tuple[Any, list[Failure]]]) -> None:
        self.errors: Counter[str] = Counter()
        self._batches = batches

    def __iter__(self) -> "TrainingBatches":
        return self

    def __next__(self) -> Any:
        batch, failures = next(self._batches)
        _count_failures(self.errors, failures, "the next image takes its place")
        return batch


def training_batches(
    dataset: ImageDataset,
    transform: Transform,
    collate: Collate,
    batch_size: int,
    *,
    first_step: int = 0,
    seed: int = 0,
    sampler: str = "shuffled",
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_error: str | None = None,
    micro_batches: int = 1,
) -> TrainingBatches:
    """Endless batches of this rank from `first_step` on, `micro_batches` of them per step.

    `collate(samples, generator)` gets a list of (transformed image, label or -1) and a CPU
    generator seeded for the batch; it runs in the worker. An image that cannot be read stops the
    run with a UserError naming it, or with on_error="skip" is replaced by the next one, counted,
    and named once in the log. on_error: None where the user is given no choice. `sampler` is one of
    `samplers.SAMPLERS`; batches lie in pinned memory where the process works on a GPU.
    """
    _check_arguments(dataset, batch_size, rank, world_size)
    check_loading(sampler=sampler, num_workers=num_workers, on_error=on_error or "raise", seed=seed)
    check_count("micro_batches", micro_batches, 1)
    check_count("first_step", first_step)
    step_size = batch_size * micro_batches * world_size
    if step_size > len(dataset) and rank == 0:
        logger.warning(
            "%r is smaller than one step of %d images: images repeat within a step",
            dataset,
            step_size,
        )
    first_batch = first_step * micro_batches
    shard = {"rank": rank, "world_size": world_size}
    indices = rank_indices(
        sampler, len(dataset), batch_size=batch_size, first_batch=first_batch, seed=seed, **shard
    )
    requests = _training_requests(indices, batch_size, first_batch, seed, **shard)
    source = TrainingSource(dataset, transform, collate, on_error == "skip")
    hint = f" ({TAKES_THE_NEXT})" if on_error else ""
    return TrainingBatches(_load(source, requests, num_workers, hint))


def evaluation_batches(
    dataset: ImageDataset,
    transform: Transform,
    batch_size: int,
    *,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    on_error: str | None = None,
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """(images, labels [B] int64, indices [B] int64) of this rank; every image once over all ranks.

    Rank r reads the images r, r + world_size, ...; ranks may get unequal numbers of batches, and
    the last batch is as small as it comes. Labels are -1 where there are none. With on_error="skip"
    an image that cannot be read is left out and named in the log; None where the user is given no
    choice. A random transform is seeded per image.
    """
    _check_arguments(dataset, batch_size, rank, world_size)
    check_loading(num_workers=num_workers, on_error=on_error or "raise")
    requests = _evaluation_requests(range(rank, len(dataset), world_size), batch_size)
    source = EvaluationSource(dataset, transform, on_error == "skip")
    hint = f" ({LEAVES_IT_OUT})" if on_error else ""
    return _evaluate(_load(source, requests, num_workers, hint))


def _evaluate(batches: Iterator) -> Iterator[tuple[Any, Tensor, Tensor]]:
    errors: Counter[str] = Counter()
    for batch, failures in batches:
        _count_failures(errors, failures, "it is left out")
        if batch is not None:
            yield batch


def _training_requests(
    indices: Iterator[int], batch_size: int, first_batch: int, seed: int, rank: int, world_size: int
) -> Iterator[Request]:
    for batch in count(first_batch):
        slot = batch * world_size + rank
        positions = range(slot * batch_size, (slot + 1) * batch_size)
        seeds = [(seed, SAMPLE, position) for position in positions]
        yield Request(list(islice(indices, batch_size)), seeds, (seed, COLLATE, slot))


def _evaluation_requests(own: range, batch_size: int) -> Iterator[Request]:
    for start in range(0, len(own), batch_size):
        indices = list(own[start : start + batch_size])
        yield Request(indices, [(EVALUATION, index) for index in indices])


def _load(
    source: TrainingSource | EvaluationSource,
    requests: Iterable[Request],
    num_workers: int,
    hint: str,
) -> Iterator[tuple[Any, list[Failure]]]:
    """The batches for `requests`, in order; a failure not to be skipped becomes a UserError."""
    # More workers than cores gain nothing, and torch warns; the batches are the same anyway.
    num_workers = min(num_workers, available_cores())
    if num_workers:
        # One folder for the sockets of all workers, which ends with this process. Of their own each
        # would leave one behind when `_end_workers` kills it.
        multiprocessing.util.get_temp_dir()
    loader = DataLoader(
        source,
        batch_size=None,  # a request is a whole batch
        sampler=requests,
        num_workers=num_workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_signals_to_the_process,
        # Not `is_available`: pinning takes memory of a GPU, which device=cpu leaves alone.
        pin_memory=torch.cuda.is_initialized(),
        generator=Generator(),  # else the loader draws from the global one
    )
    batches = iter(loader)
    try:
        while True:
            try:
                batch, failures = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if num_workers and "exited unexpectedly" in str(error):
                    raise UserError(_worker_died(error, num_workers)) from None
                raise
            if failures and not source.skip:
                raise _unreadable(source.dataset, failures[0], hint)
            if batch is None and isinstance(source, TrainingSource):
                raise UserError(
                    f"{source.dataset!r}: {len(failures)} images in a row cannot be read"
                )
            yield batch, failures
    finally:
        # Its workers end with it. An error's traceback would keep it for the garbage collector,
        # which takes the queues first: then the workers hear nothing, and each is waited for.
        del batches


def _leave_signals_to_the_process(worker: int) -> None:
    """Let a worker ignore stop signals: the step in progress still needs its batches.

    Slurm signals every process of a job. A worker ends with the process it works for.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kill workers that an error left behind; they ignore the SIGTERM by which Python ends them.

    Without this a process that an exception ends within a loop over batches waits for ever.
    """
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would call it a crash
    for child in left:
        child.kill()


def _unchanged(batch: Any) -> Any:
    return batch


def _unreadable(dataset: ImageDataset, failure: Failure, hint: str) -> UserError:
    number, path, reason = failure
    return UserError(f"cannot read image {number} of {len(dataset):,}, {path}: {reason}{hint}")


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _worker_died(error: RuntimeError, num_workers: int) -> str:
    first_line = str(error).splitlines()[0]
    return (
        f"{first_line}: usually the machine was out of memory or of shared memory (/dev/shm); use "
        f"fewer than num_workers={num_workers}, or num_workers=0 to see an error of the code itself"
    )


def _count_failures(errors: Counter[str], failures: list[Failure], consequence: str) -> None:
    for number, path, reason in failures:
        if path not in errors:
            logger.warning("cannot read image %d, %s: %s; %s", number, path, reason, consequence)
        errors[path] += 1


def _check_arguments(dataset: ImageDataset, batch_size: int, rank: int, world_size: int) -> None:
    if len(dataset) == 0:
        raise UserError(f"{dataset!r} holds no image")
    check_count("batch_size", batch_size, 1)
    if not 0 <= rank < world_size:
        raise ValueError(f"{rank=} must lie between 0 and {world_size=}")
