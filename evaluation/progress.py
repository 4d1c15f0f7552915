"""A progress line with rate and time left: rich on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from utils.console import may_be_lost

PERIOD_S = 30.0  # between two lines of a log


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


def say(line: str) -> None:
    """Print one line at once, without rich's markup; on a full disk it is lost without an error."""
    with may_be_lost():
        print(line, flush=True)


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
        yield _PlainLines(label, total)


class _PlainLines:
    """One line every `PERIOD_S` and one at the end, for logs."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self.done = 0
        self.start = self.last = time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        finished = self.done >= self.total
        if finished or now - self.last >= PERIOD_S:
            self.last = now
            rate = self.done / max(now - self.start, 1e-9)
            left = "done" if finished else f"{(self.total - self.done) / rate:.0f} s left"
            say(f"{self.label}: {self.done}/{self.total}, {rate:.0f}/s, {left}")
