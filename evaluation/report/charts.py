"""Line charts of a run's metrics as inline SVG: axes, ticks, a legend, and a title on hover."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from utils.panels import MOST_SERIES, Series

MOST_POINTS = 400  # of a curve: more than the chart has pixels for
HOVER_POINTS = 40
WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34


def chart(title: str, series: Mapping[str, Series]) -> str:
    """One figure with at most eight curves; it says so if there are more."""
    shown = {name: thin(points) for name, points in list(series.items())[:MOST_SERIES]}
    values = [value for points in shown.values() for _, value in points if math.isfinite(value)]
    steps = [step for points in shown.values() for step, _ in points]
    if not values:
        return ""
    x_ticks, y_ticks = ticks(min(steps), max(steps), 5), ticks(min(values), max(values), 5)
    x_range = (min(steps), max(max(steps), min(steps) + 1))
    y_range = (min(min(values), y_ticks[0]), max(max(values), y_ticks[-1]))
    axes = _Axes(x_range, y_range)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in y_ticks:
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        label = _tick(value, y_ticks)
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 3.5:.1f}">{label}</text>')
    for value in x_ticks:
        if x_range[0] <= value <= x_range[1]:
            x, bottom = axes.x(value), HEIGHT - BOTTOM
            parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
            label = _tick(value, x_ticks)
            parts.append(f'<text class="tick mid" x="{x}" y="{bottom + 15}">{label}</text>')
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    parts.append(f'<text class="tick mid" x="{(LEFT + right) / 2}" y="{HEIGHT - 4}">step</text>')
    for index, (name, points) in enumerate(shown.items()):
        parts += _curve(axes, index, name, points)
    parts.append("</svg>")
    names = list(shown) if len(shown) > 1 else []
    title = title if names else next(iter(shown))
    legend = "".join(
        f'<span><i class="c{index}"></i>{escape(name)}</span>' for index, name in enumerate(names)
    )
    more = len(series) - len(shown)
    legend += f"<span>and {more} more in metrics.jsonl</span>" if more > 0 else ""
    head = f"<figcaption><b>{escape(title)}</b> {legend}</figcaption>"
    return f'<figure class="chart">{head}{"".join(parts)}</figure>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round values that span low to high, about `count` of them."""
    span = high - low
    if span <= 0:
        span = abs(low) or 1.0
        low, high = low - span / 2, high + span / 2
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def thin(points: Series) -> Series:
    """A curve of at most 400 points that keeps every piece's lowest and highest value."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-len(points) // (MOST_POINTS // 2))
    kept: Series = []
    for start in range(0, len(points), size):
        piece = [p for p in points[start : start + size] if math.isfinite(p[1])]
        if piece:
            low, high = (extreme(piece, key=lambda point: point[1]) for extreme in (min, max))
            kept += sorted({low, high})
        else:
            kept.append(points[start])  # the gap stays a gap
    return kept


class _Axes:
    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)


def _curve(axes: _Axes, index: int, name: str, points: Series) -> list[str]:
    path, pen_up = [], True
    for step, value in points:
        if math.isfinite(value):
            path.append(f"{'M' if pen_up else 'L'}{axes.x(step)} {axes.y(value)}")
        pen_up = not math.isfinite(value)
    parts = [f'<path class="curve s{index}" d="{"".join(path)}"/>']
    visible = "dot" if len(points) <= 20 else "spot"
    for step, value in points[:: max(1, len(points) // HOVER_POINTS)]:
        if math.isfinite(value):
            where = f'cx="{axes.x(step)}" cy="{axes.y(value)}"'
            told = f"<title>{escape(name)}, step {step}: {value:.5g}</title>"
            radius = 3 if visible == "dot" else 5
            parts.append(f'<circle class="{visible} s{index}" {where} r="{radius}">{told}</circle>')
    return parts


def _tick(value: float, all_ticks: Sequence[float]) -> str:
    """A tick's label, with enough digits to tell the ticks apart."""
    largest = max(abs(tick) for tick in all_ticks)
    step = abs(all_ticks[1] - all_ticks[0]) if len(all_ticks) > 1 else largest or 1
    if largest and not 1e-3 <= largest < 1e5:
        places = math.floor(math.log10(largest)) - math.floor(math.log10(step) + 1e-9)
        return f"{value:.{max(2, places + 1)}g}" if abs(value) > step / 2 else "0"
    value = 0.0 if abs(value) < step / 2 else value  # never "-0"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
