"""Logging of a run: console line, metrics.jsonl, curves.png, and further sinks.

Nothing here waits for the device except `flush`, which the loop calls every `log_every` steps and
before a save. metrics.jsonl holds one line per step with the raw values (mean over micro-batches
and ranks), and one per probe.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from utils import distributed
from utils.console import Lines
from utils.meter import Meter
from utils.run_files import CURVES, METRICS, PROGRESS
from utils.whole_file import write_text

_UNDRAWN = {"step", "waited_for_data", "images_per_second", "memory_gb"}

Sink = Callable[[int, dict[str, float]], None]


class Metrics:
    """Collects the values of a run. Every rank must make the same calls; rank 0 writes and prints.

    `step` counts finished optimiser steps: the first line of a run says 1, and a checkpoint of step
    n goes with the lines up to n. Lines after `first_step` (left by a run that died later than its
    checkpoint) are removed. The run stops at `total_steps` of the recipe's `recipe_steps`.
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
        sinks: tuple[Sink, ...] = (),
        console: Console | None = None,
    ) -> None:
        self.path = Path(folder) / METRICS
        self.step, self.total_steps, self.log_every = first_step, total_steps, max(log_every, 1)
        self.images_per_step, self.sinks = images_per_step, sinks
        self.last: dict[str, float] = {}
        self._current: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._window: list[tuple[int, dict[str, Tensor], dict[str, float]]] = []
        self._since = time.perf_counter()
        self._rate = 0.0
        self._unwritten: list[str] = []
        self._told = False
        self._meters: dict[str, Meter] = {}
        self._line = (
            _ProgressLine(total_steps, first_step, console) if distributed.is_main() else None
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

    def flush(self, waited: float = 0.0) -> None:
        """Read the window off the device, write, print; `waited` is the seconds spent on data."""
        if not self._window:
            return
        names = list(self._window[-1][1])
        # float32, except where a test trains in float64 (some devices have none).
        wide = any(value.dtype is torch.float64 for value in self._window[-1][1].values())
        dtype = torch.float64 if wide else torch.float32
        stacked = torch.stack(
            [torch.stack([values[n].to(dtype) for n in names]) for _, values, _ in self._window]
        )
        rows = distributed.all_reduce_mean(stacked).tolist()
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
        self._unwritten += [
            json.dumps({k: _finite(v) for k, v in line.items()}) + "\n" for line in lines
        ]
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one torn by a crash is left out, null (not finite) is NaN."""
    lines = []
    for text in Path(path).read_text().splitlines() if Path(path).exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines.append({k: math.nan if v is None else v for k, v in line.items()})
    return lines


def truncate(path: Path, step: int) -> None:
    """Drop the lines after `step`, so that a resumed run leaves none twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        finite = ({k: _finite(v) for k, v in line.items()} for line in kept)
        write_text(path, "".join(json.dumps(line) + "\n" for line in finite))


def draw_curves(path: Path) -> None:
    """Draw metrics.jsonl over the steps into curves.png beside it, related values in one panel."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in read_metrics(path):
        for name, value in line.items():
            if name not in _UNDRAWN:
                panels.setdefault(_panel(name), {}).setdefault(name, []).append(
                    (int(line["step"]), value)
                )
    if not panels:
        return
    # Late, and without pyplot: importing it costs a second and chooses a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3 * rows))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.06, 0.3 / rows / 2, 0.98, 1 - 0.3 / rows / 3, hspace=0.35)
    for index, (title, series) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name, points in series.items():
            points = points[:: max(1, len(points) // 2000)]
            marker = "o" if len(points) < 20 else None
            axes.plot(*zip(*points, strict=True), marker=marker, ms=3, lw=1, label=name)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        if len(series) > 1:
            axes.legend(fontsize=6)
    figure.savefig(Path(path).parent / CURVES, dpi=100)


def _panel(name: str) -> str:
    if "/" in name:
        return name.split("/")[0]
    return "losses" if "loss" in name else "learning rates" if name.endswith("lr") else name


class _ProgressLine:
    """A live bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, first_step: int, console: Console | None) -> None:
        # FORCE_COLOR makes a terminal of a log, which cannot move its cursor.
        live = None if sys.stdout.isatty() else False
        self.console = console or Lines(soft_wrap=True, highlight=False, force_interactive=live)
        self.total_steps = total_steps
        self.progress = None
        if self.console.is_interactive:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(24),
                TextColumn("{task.description}"),
            )
            self.progress = Progress(*columns, console=self.console)
            self.task = self.progress.add_task("", total=total_steps, completed=first_step)
            self.progress.start()

    def show(self, line: dict[str, float], meters: Mapping[str, Meter], rate: float) -> None:
        """One line: step, rate, ETA, losses as median of the last steps (mean of all), lr."""
        eta = timedelta(seconds=round((self.total_steps - line["step"]) / rate)) if rate else "?"
        speed = f"{rate:.2f} steps/s" + (
            f" {line['images_per_second']:.0f} images/s" if "images_per_second" in line else ""
        )
        losses = (f"{name} {meter}" for name, meter in meters.items())
        text = "  ".join([f"{speed}  eta {eta}", *losses])
        text += f"  lr {line['lr']:.3g}" if "lr" in line else ""
        if self.progress:
            self.progress.update(self.task, completed=line["step"], description=text)
        else:
            self.say(f"step {line['step']}/{self.total_steps}  {text}")

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """One line of values that came at `step`."""
        self.say(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def say(self, text: str) -> None:
        """Print beside the bar."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        """Stop the bar."""
        if self.progress:
            self.progress.stop()


def _finite(value: float) -> float | None:
    # JSON knows no NaN.
    return value if math.isfinite(value) else None
