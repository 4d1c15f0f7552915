"""curves.png: the curves of metrics.jsonl."""

import math
from pathlib import Path

from utils.metrics_file import read_metrics
from utils.run_files import CURVES

_UNDRAWN = {"step", "waited_for_data", "images_per_second", "memory_gb"}


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
