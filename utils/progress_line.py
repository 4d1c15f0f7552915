"""What a training shows of itself on the console."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from utils.console import Lines
from utils.meter import Meter
from utils.run_files import METRICS

MOST_FIGURES = 4  # of one probe


def first_of_each(values: Iterable[str]) -> tuple[list[str], int]:
    """The names to show, of those of each probe (`probe/...`) the first, and how many are left."""
    names, seen = list(values), Counter[str]()
    shown = []
    for name in names:
        probe, inner, _ = name.partition("/")
        seen[probe] += bool(inner)
        if seen[probe] <= MOST_FIGURES:
            shown.append(name)
    return shown, len(names) - len(shown)


class ProgressLine:
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
        """One line of values that came at `step`, of each probe the first."""
        shown, more = first_of_each(values)
        parts = [f"{key} {values[key]:.4g}" for key in shown]
        parts += [f"({more} more in {METRICS})"] if more else []
        self.say(f"step {step}  " + "  ".join(parts))

    def say(self, text: str) -> None:
        """Print beside the bar."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        """Stop the bar."""
        if self.progress:
            self.progress.stop()
