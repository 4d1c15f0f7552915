"""A progress line with rate and time left: rich on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from utils.console import say
from utils.progress import RateLines

__all__ = ["say", "track", "track_share"]


def track(
    batches: Iterable,
    *,
    total: int,
    label: str,
    size: Callable[[Any], int] = lambda _: 1,
    shown: bool = True,
) -> Iterator:
    """Yield `batches` unchanged and show how many of `total` items have passed.

    `size(batch)` is the number of items in a batch, one by default.
    """
    with _display(label, total, shown) as advance:
        for batch in batches:
            yield batch
            advance(size(batch))


def track_share(
    batches: Iterable, *, total: int, label: str, size: Callable[[Any], int], shown: bool = True
) -> Iterator:
    """`track` rank 0's share of a pass; the label says so where others pass theirs."""
    from utils import distributed  # late: it imports torch

    world = distributed.world_size()
    label = label if world == 1 else f"{label}, process 1 of {world}"
    shown = shown and distributed.is_main()
    return track(batches, total=total, label=label, size=size, shown=shown)


@contextmanager
def _display(label: str, total: int, shown: bool) -> Iterator:
    if not shown:
        yield lambda count: None
    elif sys.stdout.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(), transient=True) as progress:
            task = progress.add_task(label, total=total, rate="")
            start = time.monotonic()

            def advance(count: int) -> None:
                progress.advance(task, count)
                seconds = time.monotonic() - start
                progress.update(task, rate=f"{progress.tasks[0].completed / seconds:.0f}/s")

            yield advance
    else:
        yield RateLines(label, total, unit="", ends=True).add
