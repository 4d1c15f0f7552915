"""Lines of progress for a log: how much is done, how fast, and how long the rest takes."""

import time

from utils.console import say

PERIOD_S = 10.0  # between two lines


class RateLines:
    """Every few seconds a line with rate and time left; `ends`: and one at the end.

    `total` is None where it is not known. `scale`: of what is counted in a `unit`. `done`: what an
    earlier try has done, which is not in the rate. shown=False: no lines.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "images",
        *,
        scale: float = 1.0,
        done: int = 0,
        ends: bool = False,
        shown: bool = True,
    ) -> None:
        self.label, self.total, self.unit, self.scale = label, total, unit, scale
        self.done, self.first, self.ends, self.shown = done, done, ends, shown
        self.start = self.last = time.monotonic()

    def add(self, count: int = 1) -> None:
        """Count what was done; a line if the last one is old enough, and with `ends` at the end."""
        self.done += count
        now = time.monotonic()
        finished = self.ends and self.total is not None and self.done >= self.total
        due = self.done > self.first and now - self.last >= PERIOD_S
        if self.shown and (finished or due):
            self.last = now
            say(self._line(max(now - self.start, 1e-9)))

    def _line(self, seconds: float) -> str:
        rate = (self.done - self.first) / seconds / self.scale
        unit = f" {self.unit}" if self.unit else ""
        speed = f"{rate:,.{0 if rate >= 10 else 1}f}{unit}/s"
        done = f"{self.label}: {self.done / self.scale:,.0f}"
        if self.total is None:
            return f"{done}{unit}, {speed}"
        left = (self.total - self.done) / self.scale
        end = f"{left / rate:,.0f} s left" if left > 0 else "done"
        return f"{done} of {self.total / self.scale:,.0f}{unit}, {speed}, {end}"
