"""curves.png: the curves of metrics.jsonl."""

import math
from pathlib import Path

from utils.metrics_file import read_metrics
from utils.panels import MOST_SERIES, panels
from utils.run_files import CURVES


def draw_curves(path: Path) -> None:
    """Draw metrics.jsonl over the steps into curves.png beside it, related values in one panel."""
    drawn = panels(read_metrics(path))
    if not drawn:
        return
    # Late, and without pyplot: importing it costs a second and chooses a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    last = max(
        step for series in drawn.values() for points in series.values() for step, _ in points
    )
    for index, (title, series) in enumerate(drawn.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for name, points in list(series.items())[:MOST_SERIES]:
            points = points[:: max(1, len(points) // 2000)]
            marker = "o" if len(points) < 20 else None
            # Unclipped, the last point is whole.
            curve = tuple(zip(*points, strict=True))
            axes.plot(*curve, marker=marker, ms=2, lw=1, clip_on=False, label=name)
        some = f", {MOST_SERIES} of {len(series)} curves" if len(series) > MOST_SERIES else ""
        axes.set_title(title + some if len(series) > 1 else next(iter(series)), fontsize=9)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.tick_params(labelsize=7)
        if index + columns >= len(drawn):  # the lowest of its column
            axes.set_xlabel("step", fontsize=8)
        if len(series) > 1:
            # Beside the curves, where it hides none.
            axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(Path(path).parent / CURVES, dpi=100)
