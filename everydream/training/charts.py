"""Line charts as inline SVG, without a library: axes, grid, lines; a script in the page reads values off them."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 230  # of the drawing's own coordinates; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 12, 28
MAX_POINTS = 600  # a line; more than there are pixels
OUTLIERS = 0.01  # share of the points that may lie outside the chart at its top


@dataclass(frozen=True)
class Line:
    """`points`: (step, value), steps rising. `kind`: a CSS class; "faint" lines do not count for the scale's top."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = ""


def chart(title: str, lines: Sequence[Line], *, unit: str = "", from_zero: bool = True) -> str:
    """A figure with a legend. Lines without points are left out; without any there is no chart: an empty string."""
    lines = [Line(line.name, thinned(line.points), line.kind) for line in lines if line.points]
    if not lines:
        return ""
    x_low, x_high = _range([x for line in lines for x, _ in line.points])
    y_low, y_high = _y_range(lines, from_zero)
    steps, values = ticks(x_low, x_high, 6), ticks(y_low, y_high, 5)
    # The topmost line of the grid is the top of the chart.
    y_high = max(y_high, values[-1]) if values else y_high
    scale = _Scale(x_low, x_high, y_low, y_high)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for value in values:
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for step in steps:
        x = scale.x(step)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(step)}</text>')
    colour = 0
    for line in lines:
        drawn = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line c{colour} {line.kind}" points="{drawn}"/>')
        if len(line.points) == 1:
            x, y = line.points[0]
            parts.append(f'<circle class="dot c{colour}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3"/>')
        colour += line.kind != "faint"  # a faint line has the colour of the one that follows it
    parts.append(f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>')
    shown = [line for line in lines if line.kind != "faint"]
    legend = "".join(
        f'<span><i class="c{i}"></i>{html.escape(line.name)} <b data-line="{i}"></b></span>'
        for i, line in enumerate(shown)
    )
    data = {
        "x": [x_low, x_high, LEFT, WIDTH - RIGHT],
        "lines": [[[_short(x), _short(y)] for x, y in line.points] for line in shown],
    }
    unit = f" <small>{html.escape(unit)}</small>" if unit else ""
    return (
        f'<figure class="chart" data-chart="{html.escape(json.dumps(data, separators=(",", ":")))}">'
        f'<figcaption><h3>{html.escape(title)}{unit}</h3><div class="legend">{legend}</div></figcaption>'
        f"{''.join(parts)}</figure>"
    )


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    return low, low + (abs(low) or 1.0)


def _y_range(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
    values = sorted(y for line in lines for _, y in line.points)
    top = values[min(len(values) - 1, math.ceil(len(values) * (1 - OUTLIERS)))]
    low = min(0.0, values[0]) if from_zero else values[0]
    low, high = _range([low, top])
    return low, high + 0.04 * (high - low)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short, for an axis: 1200, 0.05, 1.5e-6, 3.2M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M" if size < 1e9 else f"{value / 1e9:g}G"
    if size == 0 or size >= 1e-3:
        return f"{value:g}"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def thinned(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """Neighbours averaged until at most `limit` are left; the last one stays as it is."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil((len(points) - 1) / (limit - 1))
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means, points[-1]]


def smoothed(points: Sequence[tuple[float, float]], over: int) -> list[tuple[float, float]]:
    """An exponential mean over about `over` points, without a bias to the start (Kingma & Ba 2015, section 3)."""
    keep, mean, weight, found = 1 - 1 / max(1, over), 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, mean / weight))
    return found


def _short(value: float) -> float:
    return float(f"{value:.6g}")
