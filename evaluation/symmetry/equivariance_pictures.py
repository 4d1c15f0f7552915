"""Pictures of the equivariance report: errors by layer and element, and over the angle."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from evaluation.pictures.figures import save
from evaluation.symmetry.angles import AngleError

FLOORS = {"float32": 1e-8, "float64": 1e-16}
"""Errors are shown from here (rounding) to 1."""


def draw_layer_errors(
    rows: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    path: Path,
    *,
    dtype: str = "float32",
) -> Path:
    """A heat map per net, on a log scale: net -> layer -> element -> relative error."""
    floor = FLOORS[dtype]
    tallest = max(len(layers) for layers in rows.values())
    size = (1.2 + 4.4 * len(rows), 1.4 + 0.24 * tallest)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    image = None
    for axis, (name, layers) in zip(axes, rows.items(), strict=True):
        elements = list(next(iter(layers.values())))
        values = np.array(
            [
                [np.nan if e is None else max(e, floor) for e in by.values()]
                for by in layers.values()
            ]
        )
        axis.set_facecolor("0.85")
        image = axis.imshow(values, cmap="RdYlBu_r", norm=LogNorm(floor, 1.0), aspect="auto")
        axis.set_xticks(range(len(elements)), elements, fontsize=8)
        axis.set_yticks(range(len(layers)), list(layers), fontsize=7)
        axis.set_title(name, fontsize=10)
        for row, by_element in enumerate(layers.values()):
            for column, error in enumerate(by_element.values()):
                if error is not None:
                    text = f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e") if error else "0"
                    pale = 0.12 < np.log(max(error, floor) / floor) / np.log(1 / floor) < 0.88
                    colour = "black" if pale else "white"
                    axis.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    assert image is not None
    bar = figure.colorbar(image, ax=list(axes), pad=0.01, extend="max")
    bar.set_label("relative error", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle("|f(g x) - g f(x)| / |f(x)| after each layer", fontsize=11)
    return save(figure, path)


def draw_angle_errors(angles: Mapping[str, Mapping[float, AngleError]], path: Path) -> Path:
    """Errors over the angle: net -> angle -> errors; the class token left, the patches right."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key in zip(axes, ("cls", "patches"), strict=True):
        for number, (name, by_angle) in enumerate(angles.items()):
            found = [getattr(error, key) for error in by_angle.values()]
            control = [getattr(error, f"{key}_control") for error in by_angle.values()]
            if found[0] is None:
                continue
            around = [*by_angle, 360]
            colour = f"C{number}"
            axis.plot(around, [*found, found[0]], "o-", color=colour, markersize=3, label=name)
            axis.plot(around, [*control, control[0]], ":", color=colour)
        for quarter in range(0, 361, 90):
            axis.axvline(quarter, color="0.8", linewidth=0.8, zorder=0)
        axis.plot([], [], ":", color="0.4", label="there and back: interpolation alone")
        axis.set(xlim=(-5, 365), xticks=range(0, 361, 45), xlabel="angle (degrees)")
        axis.set_ylim(bottom=0)
    axes[0].set(title="class token: |f(R x) - f(x)| / |f(x)|", ylabel="relative error")
    axes[1].set(title="patches: |f(R x) - R f(x)| / |f(x)|")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return save(figure, path)
