"""A picture of costs: speed or published accuracy over multiply-adds, each net beside its twin."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from evaluation.cost.table import Result, size_in_words
from evaluation.published import PUBLISHED
from utils.errors import UserError

ACCURACIES = {
    "accuracy/acc1": "published top-1 on ImageNet (%)",
    "linear/linear_top1": "published top-1 on ImageNet, linear probe (%)",
}


def heights(results: list[Result], y: str) -> tuple[str, dict[str, float]]:
    """The words of the axis, and the height of each net that has one; UserError if none has.

    "throughput": images per second of the first measured pass. "accuracy": published top-1; of
    trained classifiers where there are such among the nets, else of linear probes.
    """
    if y == "accuracy":
        for key, words in ACCURACIES.items():
            found = {
                result.name: PUBLISHED[result.name].figures[key].value
                for result in results
                if result.name in PUBLISHED and key in PUBLISHED[result.name].figures
            }
            if found:
                return words, found
        raise UserError("nothing to draw: none of these nets has a published accuracy")
    kinds = [kind for result in results for kind in result.speeds]
    if not kinds:
        raise UserError("nothing to draw: none of these nets could be timed")
    found = {r.name: r.speeds[kinds[0]].images_per_second for r in results if kinds[0] in r.speeds}
    return f"images/s, {kinds[0]}", found


def draw_costs(
    results: list[Result], path: Path, protocol: Mapping[str, Any], *, y: str = "throughput"
) -> Path:
    """One labelled point per net, an arrow from each plain twin to what is held against it."""
    label, found = heights(results, y)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    points = {
        result.name: (result.cost.multiply_adds / 1e9, found[result.name])
        for result in results
        if result.name in found
    }
    pairs = {
        result.name: result.twin
        for result in results
        if result.name in points and result.twin in points
    }
    for name, point in points.items():
        twin = pairs.get(name)
        # The label stands on the side of its point that no arrow touches.
        others = [twin] if twin else [other for other in pairs if pairs[other] == name]
        above = point[1] >= max((points[other][1] for other in others), default=0)
        colour, marker = ("tab:blue", "o") if twin else ("tab:gray", "s")
        axis.plot(*point, marker, color=colour)
        axis.annotate(
            name,
            point,
            (0, 6 if above else -6),
            textcoords="offset points",
            fontsize=7,
            ha="center",
            va="bottom" if above else "top",
            zorder=5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
        if twin:
            arrow = {"arrowstyle": "->", "color": "tab:gray", "shrinkA": 5, "shrinkB": 5}
            axis.annotate("", point, points[twin], arrowprops=arrow)
    axis.set(xlabel="multiply-adds of one image (10^9)", ylabel=label)
    axis.set_title(_in_words(protocol, y), fontsize=8)
    axis.margins(0.2)
    if y == "throughput":  # else a difference of speeds looks larger than it is
        axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return path


def _in_words(protocol: Mapping[str, Any], y: str) -> str:
    size = protocol["size"]
    images = f"images of {size} x {size}" if size else size_in_words(protocol)
    if y == "accuracy":  # published: nothing was measured here
        return images
    how = f"batch {protocol['batch_size']}, {protocol['arithmetic']}, {protocol['mode']}"
    return f"{protocol['device']}: {images}, {how}"
