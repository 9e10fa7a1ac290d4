"""Small charts as inline SVG: no scripts, fonts or external files, so that a report is self-contained and prints."""

import math
from dataclasses import dataclass
from html import escape
from itertools import groupby

COLORS = ("#2c6e9b", "#c4622d", "#3f8159", "#8a5a9e", "#b08d1e", "#5b6b78", "#b0466b", "#3b8f8f")
INK, MUTED, GRID = "#2b2622", "#857b72", "#e7e1d9"
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 18, 28
MOST = 400  # points of a curve
WIDE = 32  # width of a dot's column from which on its label fits


@dataclass(frozen=True)
class Line:
    """A curve; a y that is None leaves a gap."""

    name: str
    xs: list[float]
    ys: list[float | None]


@dataclass(frozen=True)
class Dot:
    """A value with its interval. `strong` dots are filled and connected."""

    label: str
    group: str
    value: float
    low: float
    high: float
    strong: bool = False
    note: str = ""


def line_chart(lines: list[Line], width: int = 340, height: int = 190, zero: bool = False,
               whole: bool = True) -> str:
    """Curves over a shared x axis. zero: the y axis includes 0; whole: x counts something. Returns "" without any
    finite point. Of a curve with more than MOST points the extremes of equal stretches are drawn."""
    points = [(x, y) for line in lines for x, y in zip(line.xs, line.ys, strict=True) if finite(y)]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points] + [0.0] * zero
    x_ticks = [t for t in ticks(min(xs), max(xs), 5) if t == int(t) or not whole]
    y_ticks = ticks(min(ys), max(ys), 4)
    to_x = scale(min(xs), max(xs), LEFT, width - RIGHT)
    to_y = scale(y_ticks[0], y_ticks[-1], height - BOTTOM, TOP)
    body = y_axis(y_ticks, to_y, width, number)
    body += [text(min(to_x(t), width - 3.3 * len(f"{t:g}")), height - BOTTOM + 16, f"{t:g}", "middle") for t in x_ticks
             if LEFT - 1 <= to_x(t) <= width - RIGHT + 1]
    for i, line in enumerate(lines):
        color = COLORS[i % len(COLORS)]
        for there, run in groupby(thinned(line), lambda point: finite(point[1])):
            path = [f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in run] if there else []
            if len(path) == 1:
                x, y = path[0].split(",")
                body.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>')
            elif path:
                body.append(f'<polyline points="{" ".join(path)}" fill="none" stroke="{color}" stroke-width="1.6" '
                            f'stroke-linejoin="round"><title>{escape(line.name)}</title></polyline>')
    return svg(body, width, height, "line chart: " + ", ".join(line.name for line in lines))


def thinned(line: Line) -> list[tuple[float, float | None]]:
    """The points of a curve, at most MOST: the lowest and the highest of each of MOST / 2 stretches, a gap where a
    stretch has no finite point."""
    points = list(zip(line.xs, line.ys, strict=True))
    if len(points) <= MOST:
        return points
    size, kept = math.ceil(2 * len(points) / MOST), []
    for i in range(0, len(points), size):
        there = [point for point in points[i:i + size] if finite(point[1])]
        ends = (min(there, key=lambda p: p[1]), max(there, key=lambda p: p[1])) if there else (points[i],)
        kept += sorted(set(ends))
    return kept


def share(value: float) -> str:
    return f"{100 * value:.1f}"


def dot_chart(dots: list[Dot], width: int = 1000, height: int = 260, form=None,
              label: str = "pass rates with 95 % intervals") -> str:
    """Values from 0 with whiskers, one column per dot, in separate groups; in percent, or formatted by `form`."""
    if not dots:
        return ""
    color = COLORS[0]
    y_ticks = ticks(0.0, max(0.0 if form else 0.05, *(d.high for d in dots)), 4)
    write, unit = form or share, "" if form else " %"
    to_y = scale(0.0, y_ticks[-1], height - BOTTOM - 14, TOP)
    body = y_axis(y_ticks, to_y, width, form or (lambda v: f"{100 * v:g} %"))
    groups = {g: [d for d in dots if d.group == g] for g in dict.fromkeys(d.group for d in dots)}
    gap = 0.6
    step = (width - LEFT - RIGHT) / (len(dots) + gap * len(groups))
    at, placed = LEFT + step * gap / 2, []
    for name, members in groups.items():
        if placed:
            at += step * gap
            body.append(f'<line x1="{at - step * gap / 2:.1f}" x2="{at - step * gap / 2:.1f}" y1="{TOP}" '
                        f'y2="{height - 4}" stroke="{GRID}"/>')
        placed += [(at + step * (i + 0.5), d) for i, d in enumerate(members)]
        title = name if step * len(members) > 1.4 * WIDE else name.removeprefix("round ")
        body.append(text(at + step * len(members) / 2, height - 8, title, "middle", INK))
        at += step * len(members)
    strong = " ".join(f"{x:.1f},{to_y(d.value):.1f}" for x, d in placed if d.strong)
    body.append(f'<polyline points="{strong}" fill="none" stroke="{color}" stroke-width="1.2" stroke-dasharray="4 3" '
                'opacity="0.6"/>')
    for x, d in placed:
        tip = f"{d.group} {d.label}: {write(d.value)}{unit} ({write(d.low)} to {write(d.high)}) {d.note}"
        body.append(
            f'<g><title>{escape(tip)}</title><line x1="{x:.1f}" x2="{x:.1f}" y1="{to_y(d.low):.1f}" '
            f'y2="{to_y(d.high):.1f}" stroke="{color}" stroke-width="2" opacity="0.45" stroke-linecap="round"/>'
            f'<circle cx="{x:.1f}" cy="{to_y(d.value):.1f}" r="4.5" stroke="{color}" stroke-width="1.8" '
            f'fill="{color if d.strong else "#fff"}"/></g>')
        if d.strong or step > WIDE:  # other values are in the tooltip only
            body.append(text(x + 7, to_y(d.value) - 6, write(d.value), "start", INK))
        if step > WIDE:
            body.append(text(x, height - BOTTOM, d.label, "middle"))
    return svg(body, width, height, label)


def bar_chart(bars: list[tuple[str, float, str]], width: int = 1000, label: int = 170) -> str:
    """Horizontal bars from (label, value, text beside the bar)."""
    if not bars:
        return ""
    row, most = 20, max(value for _, value, _ in bars) or 1.0
    beside = 8 + 6.4 * max(len(note) for _, _, note in bars)
    to_x = scale(0.0, most, label, max(label + 20, width - beside))
    body = []
    for i, (name, value, note) in enumerate(bars):
        y, wide = 4 + row * i, max(1.0, to_x(value) - label)
        body += [text(label - 8, y + 12, name, "end", INK),
                 f'<rect x="{label}" y="{y + 2}" width="{wide:.1f}" height="{row - 7}" rx="2" fill="{COLORS[0]}" '
                 'opacity="0.85"/>', text(label + wide + 6, y + 12, note, "start")]
    return svg(body, width, row * len(bars) + 8, "bar chart")


def column_chart(labels: list[str], series: list[tuple[str, list[float]]], width: int = 340, height: int = 190) -> str:
    """Vertical bars, one color per series, side by side at each label."""
    values = [v for _, column in series for v in column]
    if not values:
        return ""
    y_ticks = ticks(0.0, max(values) or 1.0, 4)
    to_y = scale(0.0, y_ticks[-1], height - BOTTOM, TOP)
    body = y_axis(y_ticks, to_y, width, number)
    step = (width - LEFT - RIGHT) / len(labels)
    thin = 0.8 * step / len(series)
    for i, label in enumerate(labels):
        x = LEFT + step * (i + 0.1)
        body.append(text(x + 0.4 * step, height - BOTTOM + 16, label, "middle"))
        for j, (name, column) in enumerate(series):
            y = to_y(column[i])
            body.append(f'<rect x="{x + j * thin:.1f}" y="{y:.1f}" width="{max(1.0, thin - 1):.1f}" '
                        f'height="{max(0.0, height - BOTTOM - y):.1f}" fill="{COLORS[j % len(COLORS)]}">'
                        f"<title>{escape(f'{name}, {label}: {column[i]:g}')}</title></rect>")
    return svg(body, width, height, "column chart")


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that enclose [low, high], about `count` steps apart."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def scale(low: float, high: float, start: float, end: float):
    """The linear map of [low, high] to [start, end]; a single point maps to the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float) -> str:
    value = 0.0 if abs(value) < 1e-12 else value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def y_axis(at: list[float], to_y, width: int, form) -> list[str]:
    return [f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{to_y(tick):.1f}" y2="{to_y(tick):.1f}" stroke="{GRID}"/>'
            + text(LEFT - 6, to_y(tick) + 4, form(tick), "end") for tick in at]


def text(x: float, y: float, content: str, anchor: str, color: str = MUTED) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(content)}</text>'


def svg(body: list[str], width: int, height: int, label: str) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(label)}" '
            f'xmlns="http://www.w3.org/2000/svg" font-size="11">{"".join(body)}</svg>')
