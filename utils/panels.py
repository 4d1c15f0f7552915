"""A run's metrics as panels of curves, for curves.png and for the report."""

import math
from collections.abc import Iterable, Mapping

Series = list[tuple[int, float]]
Panels = dict[str, dict[str, Series]]

UNDRAWN = {"step", "waited_for_data", "steps_per_second", "memory_gb", "unread_images"}
FIRST = ("loss", "accuracy", "learning rate")
MOST_SERIES = 8  # in one panel
FEWEST_POINTS = 2  # of a curve; a single figure stands in the tables


def panels(metrics: Iterable[Mapping[str, float]]) -> Panels:
    """Curves by panel: losses, learning rates, each probe's figures, and every other value alone.

    Values that were logged once, as by a probe at the end, are left out.
    """
    series: dict[str, Series] = {}
    for line in metrics:
        for name, value in line.items():
            if name not in UNDRAWN:
                series.setdefault(name, []).append((int(line["step"]), value))
    found: Panels = {}
    for name, points in series.items():
        if sum(math.isfinite(value) for _, value in points) >= FEWEST_POINTS:
            found.setdefault(_panel(name), {})[name] = points
    return dict(sorted(found.items(), key=lambda item: _rank(item[0])))


def _panel(name: str) -> str:
    if "loss" in name:
        return "loss" if "/" not in name else f"{name.split('/')[0]} loss"
    if name == "lr" or name.endswith("_lr"):
        return "learning rate"
    return name.split("/")[0]


def _rank(title: str) -> tuple[int, str]:
    return (FIRST.index(title) if title in FIRST else len(FIRST)), title
