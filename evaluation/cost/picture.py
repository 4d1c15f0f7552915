"""A picture of costs: speed or published accuracy over multiply-adds, each net beside its twin."""

from pathlib import Path

from matplotlib.figure import Figure

from evaluation.cost.table import Result
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


def draw_costs(results: list[Result], path: Path, *, y: str = "throughput") -> Path:
    """One labelled point per net, an arrow from each plain twin to what is held against it."""
    label, found = heights(results, y)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    twins = {result.name: result.twin for result in results}
    points = {
        result.name: (result.cost.multiply_adds / 1e9, found[result.name])
        for result in results
        if result.name in found
    }
    # Nets of one group lie close to each other: their labels go above and below in turn.
    for index, (name, point) in enumerate(points.items()):
        twin, above = twins[name], index % 2 == 0
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
        )
        if twin is not None and twin in points:
            arrow = {"arrowstyle": "->", "color": "tab:gray", "shrinkA": 5, "shrinkB": 5}
            axis.annotate("", point, points[twin], arrowprops=arrow)
    axis.set(xlabel="multiply-adds of one image (10^9)", ylabel=label)
    axis.margins(0.2)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return path
