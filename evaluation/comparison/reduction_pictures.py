"""The picture of the comparison of token reductions: quality over cost, nets beside each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from evaluation.pictures.figures import save

HEIGHTS = {"accuracy": "accuracy (%)", "miou": "mIoU (%)"}
WIDTHS = {
    "multiply_adds": ("multiply-adds of one image (10^6)", 1e-6),
    "images_per_second": ("images/s", 1.0),
}
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.")  # of the models
MARKERS = ("o", "s", "^", "D")


def draw_reductions(figures: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """One line per model and method through its strengths, from the unreduced net on.

    A panel for each quality over each cost that was measured; figures as `compare` returns them.
    """
    rows = list(figures.values())
    heights = [key for key in HEIGHTS if any(key in row for row in rows)]
    widths = [key for key in WIDTHS if any(key in row for row in rows)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["strength"]))
    colours = {name: colormaps["tab10"](index % 10) for index, name in enumerate(methods)}
    figure = Figure(figsize=(6 * len(widths) + 2, 4.2 * len(heights)), layout="constrained")
    panels = figure.subplots(len(heights), len(widths), squeeze=False)
    for height, line in zip(heights, panels, strict=True):
        for width, axis in zip(widths, line, strict=True):
            _draw(axis, rows, width, height, models, colours)
    marks = [
        Line2D([], [], color="black", linestyle=STYLES[i % 4], marker=MARKERS[i % 4], label=name)
        for i, name in enumerate(models)
    ]
    marks += [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=marks, loc="outside right center", fontsize=8)
    return save(figure, path)


def _draw(
    axis: Axes,
    rows: list[Mapping[str, Any]],
    width: str,
    height: str,
    models: list[str],
    colours: Mapping[str, Any],
) -> None:
    label, unit = WIDTHS[width]
    for index, model in enumerate(models):
        style: dict[str, Any] = {"linestyle": STYLES[index % 4], "marker": MARKERS[index % 4]}
        own = [row for row in rows if row["model"] == model and width in row and height in row]
        whole = [row for row in own if not row["strength"]]
        for method, colour in colours.items():
            points = whole + [row for row in own if row["method"] == method]
            axis.plot(
                [unit * row[width] for row in points],
                [row[height] for row in points],
                color=colour,
                markersize=4,
                linewidth=1,
                **style,
            )
        for row in whole:
            axis.plot(unit * row[width], row[height], MARKERS[index % 4], color="black", ms=9)
            place, above = (unit * row[width], row[height]), (0, 8)
            axis.annotate(model, place, above, textcoords="offset points", ha="center")
    axis.margins(0.12)  # an unreduced net is often the outermost point: room for its name
    axis.set(xlabel=label, ylabel=HEIGHTS[height])
    axis.grid(alpha=0.3)
