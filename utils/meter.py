"""Running statistics of a value, in the form of DINOv2's and DeiT's logs."""

import math
from collections import deque


class Meter:
    """Statistics of the last `window` updates and of all: `str(meter)` is "median (global_avg)".

    The median of an even number of values is the lower one, as torch's is.
    """

    def __init__(self, window: int = 20, text: str = "{median:.4f} ({global_avg:.4f})") -> None:
        self.text = text
        self.values: deque[float] = deque(maxlen=window)
        self.total, self.count = 0.0, 0

    def update(self, value: float, count: int = 1) -> None:
        """Add a value, the mean of `count` of them."""
        self.values.append(value)
        if math.isfinite(value):  # one skipped step is no reason to know no mean any more
            self.total += value * count
            self.count += count

    @property
    def value(self) -> float:
        """The last one."""
        return self.values[-1]

    @property
    def median(self) -> float:
        """Lower median of the window."""
        return sorted(self.values)[(len(self.values) - 1) // 2]

    @property
    def avg(self) -> float:
        """Mean of the window."""
        return sum(self.values) / len(self.values)

    @property
    def global_avg(self) -> float:
        """Mean of all finite values, each as often as it counts; NaN where there is none."""
        return self.total / self.count if self.count else math.nan

    @property
    def max(self) -> float:
        """Largest of the window."""
        return max(self.values)

    def __str__(self) -> str:
        names = ("value", "median", "avg", "global_avg", "max")
        return self.text.format(**{name: getattr(self, name) for name in names})
