"""Logging of a run: what goes to the console, metrics.jsonl and further sinks, and when.

Nothing here waits for the device except `flush`, which the loop calls every `log_every` steps and
before a save. metrics.jsonl holds one line per step with the raw values (mean over micro-batches
and ranks), and one per probe.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from utils import distributed
from utils.curves import draw_curves
from utils.meter import Meter
from utils.metrics_file import as_line, truncate
from utils.progress_line import ProgressLine
from utils.run_files import METRICS, PROGRESS

Sink = Callable[[int, dict[str, float]], None]


class Metrics:
    """Collects the values of a run. Every rank must make the same calls; rank 0 writes and prints.

    `step` counts finished optimiser steps: the first line of a run says 1, and a checkpoint of step
    n goes with the lines up to n. Lines after `first_step` (left by a run that died later than its
    checkpoint) are removed. The run stops at `total_steps` of the recipe's `recipe_steps`.
    `unread_images` counts over ranks and starts; `unread_before` is the number of earlier starts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int = 0,
        total_steps: int = 0,
        recipe_steps: int = 0,
        log_every: int = 10,
        images_per_step: int = 0,
        unread_before: int = 0,
        sinks: tuple[Sink, ...] = (),
        console: Console | None = None,
    ) -> None:
        self.path = Path(folder) / METRICS
        self.step, self.total_steps, self.log_every = first_step, total_steps, max(log_every, 1)
        self.images_per_step, self.sinks = images_per_step, sinks
        self.last: dict[str, float] = {}
        self.unread_images = self._unread_before = unread_before
        self._current: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._window: list[tuple[int, dict[str, Tensor], dict[str, float]]] = []
        self._since = time.perf_counter()
        self._rate = 0.0
        self._unwritten: list[str] = []
        self._told = False
        self._meters: dict[str, Meter] = {}
        self._line = (
            ProgressLine(total_steps, first_step, console) if distributed.is_main() else None
        )
        if distributed.is_main():
            truncate(self.path, first_step)
        self._progress = {"first_step": first_step, "total_steps": recipe_steps or total_steps}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's values without waiting for them."""
        for name, value in losses.items():
            value = value.detach()
            self._current[name] = self._current[name] + value if name in self._current else value
        self._micro_batches += 1

    def current(self) -> dict[str, Tensor]:
        """Means over the micro-batches so far of the step in progress, on the device."""
        return {name: value / self._micro_batches for name, value in self._current.items()}

    def end_step(
        self, step: int, schedules: Mapping[str, float], norms: Mapping[str, Tensor]
    ) -> None:
        """Close a step: its losses, schedules' values and gradient norms join the window.

        The first call writes progress.json, which tells other programs the total number of steps. A
        start that fails before its first step leaves an earlier progress.json as it is.
        """
        values = self.current() | {f"grad_norm/{name}": norm for name, norm in norms.items()}
        self._window.append((step, values, dict(schedules)))
        self._current, self._micro_batches, self.step = {}, 0, step
        if self._progress and distributed.is_main():
            with suppress(OSError):  # a full disk
                self.path.with_name(PROGRESS).write_text(json.dumps(self._progress) + "\n")
        self._progress = {}

    def due(self, step: int) -> bool:
        """Whether `step` is one to flush at."""
        return step % self.log_every == 0

    def flush(self, waited: float = 0.0, unread: int = 0) -> None:
        """Read the window off the device, write, print.

        waited: seconds this rank spent on data in the window; unread: images of this start that
        it could not read.
        """
        if not self._window:
            return
        names = list(self._window[-1][1])
        # float32, except where a test trains in float64 (some devices have none).
        wide = any(value.dtype is torch.float64 for value in self._window[-1][1].values())
        dtype = torch.float64 if wide else torch.float32
        stacked = torch.stack(
            [torch.stack([values[n].to(dtype) for n in names]) for _, values, _ in self._window]
        )
        # A further column, so that the images unread on all ranks come with the same reduction.
        stacked = torch.cat([stacked, torch.full_like(stacked[:, :1], unread)], dim=1)
        rows = distributed.all_reduce_mean(stacked).tolist()
        unread_here = round([row.pop() for row in rows][-1] * distributed.world_size())
        self.unread_images = self._unread_before + unread_here
        seconds = time.perf_counter() - self._since
        self._rate = len(rows) / max(seconds, 1e-9)
        lines = [
            {"step": step, **dict(zip(names, row, strict=True)), **schedules}
            for (step, _, schedules), row in zip(self._window, rows, strict=True)
        ]
        lines[-1] |= {
            "steps_per_second": self._rate,
            "waited_for_data": waited / max(seconds, 1e-9),
        }
        if self.images_per_step:
            lines[-1]["images_per_second"] = self._rate * self.images_per_step
        if self.unread_images:
            lines[-1]["unread_images"] = self.unread_images
        if torch.cuda.is_initialized():
            lines[-1]["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        means = {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(names)}
        self.last = {**lines[-1], **means}
        self._window, self._since = [], time.perf_counter()
        self._write(lines)
        if self._line:
            for name in (name for name in names if not name.startswith("grad_norm/")):
                meter = self._meters.setdefault(name, Meter())
                for row in rows:
                    meter.update(row[names.index(name)])
            self._line.show(self.last, self._meters, self._rate)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write and print values that belong to no window (probes, health)."""
        if not values:
            return
        self._write([{"step": step, **values}])
        self.last |= values
        if self._line:
            self._line.note(step, values)

    def say(self, text: str) -> str:
        """Print `text`, unless it is empty, above the progress bar on rank 0; returns it."""
        if self._line and text:
            self._line.say(text)
        return text

    def rest(self) -> None:
        """Restart the clock of the rate after a flush, so that probes and saving do not count."""
        if not self._window:
            self._since = time.perf_counter()

    def close(self) -> None:
        """End the progress line and draw curves.png."""
        if self._line:
            self._line.close()
            with suppress(OSError):  # a full disk: the run's end tells of it
                draw_curves(self.path)

    def _write(self, lines: list[dict[str, float]]) -> None:
        if not distributed.is_main():
            return
        self._unwritten += map(as_line, lines)
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.writelines(self._unwritten)
            self._unwritten, self._told = [], False
        except OSError as error:  # a full disk may have room again before the run ends
            with suppress(OSError):
                os.truncate(self.path, whole)
            if not self._told:
                self._told = True
                self.say(f"{self.path} takes no lines ({error.strerror}): they wait in memory")
        for sink in self.sinks:
            sink(int(lines[-1]["step"]), {k: v for k, v in lines[-1].items() if k != "step"})
