"""Charts as SVG files of their own, for pages that have no style sheet: panels side by side, one legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ldm.web.chart import Curve, number, ticks

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 34, 46
_COLOURS = ("#3266cc", "#d0582a", "#2b8a57", "#8a4fb5", "#b58a00", "#c23b6b", "#2a8fa8", "#777777")
_DASHES = ("", "6 4", "2 3")
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #333 }
.title { font-weight: 600 }
.axis { stroke: #999; stroke-width: 1 }
.grid { stroke: #ddd; stroke-width: 1 }
.line { fill: none; stroke-width: 2 }
rect { fill: #fff }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .grid { stroke: #444 } rect { fill: #161616 } }
"""


@dataclass(frozen=True)
class Panel:
    """One chart: its title says what is up, `x_label` what is across."""

    title: str
    curves: Sequence[Curve]
    x_label: str
    log_x: bool = False
    log_y: bool = False


def svg(panels: Sequence[Panel], columns: int = 2) -> str:
    """A whole SVG file. A curve has the same colour in every panel; points off a log axis are left out.

    Raises ValueError when there is nothing to draw.
    """
    panels = [p for p in panels if any(_points(c, p) for c in p.curves)]
    if not panels:
        raise ValueError("figure: no finite point in any panel")
    labels = list(dict.fromkeys(c.label for p in panels for c in p.curves))
    columns = min(columns, len(panels))
    width, places, legend = _legend(labels, columns * _WIDTH)
    parts = []
    for i, panel in enumerate(panels):
        x, y = i % columns * _WIDTH, legend + i // columns * _HEIGHT
        parts.append(f"<g transform='translate({x} {y})'>{_panel(panel, labels)}</g>")
    height = legend + math.ceil(len(panels) / columns) * _HEIGHT
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img'>"
    return f"{head}<style>{_STYLE}</style><rect width='{width}' height='{height}'/>{places}{''.join(parts)}</svg>\n"


def _legend(labels: Sequence[str], width: int) -> tuple[int, str, int]:
    """(width, drawing, height) of the names, as many in a row as fit."""
    parts, x, y = [], 16.0, 22
    for i, label in enumerate(labels):
        step = 48 + 8.2 * len(label)
        if x > 16 and x + step > width:
            x, y = 16.0, y + 22
        parts.append(f"<path class='line' {_look(i)} d='M{x:.0f},{y - 4}h24'/>")
        parts.append(f"<text x='{x + 30:.0f}' y='{y}'>{escape(label)}</text>")
        x += step
    return width, "".join(parts), y + 12


def _look(index: int) -> str:
    dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
    return f"stroke='{_COLOURS[index % len(_COLOURS)]}'" + (f" stroke-dasharray='{dash}'" if dash else "")


def _points(curve: Curve, panel: Panel) -> list[tuple[float, float]]:
    pairs = [(float(x), float(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    return [
        (x, y)
        for x, y in pairs
        if math.isfinite(x) and math.isfinite(y) and (x > 0 or not panel.log_x) and (y > 0 or not panel.log_y)
    ]


def _span(values: Sequence[float], log: bool, pad: float) -> tuple[float, float]:
    scaled = [math.log10(v) if log else v for v in values]
    low, high = min(scaled), max(scaled)
    extra = pad * (high - low) or 0.5
    return low - extra, high + extra


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between the powers `low` and `high`; powers of ten alone where those are many."""
    inside = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    inside = [v for v in inside if low <= math.log10(v) <= high]
    if len(inside) > 7:
        inside = [v for v in inside if math.log10(v).is_integer()]
    return inside if len(inside) > 1 else [10**tick for tick in ticks(low, high, 4)]


def _panel(panel: Panel, labels: Sequence[str]) -> str:
    drawn = {c.label: _points(c, panel) for c in panel.curves}
    every = [p for points in drawn.values() for p in points]
    x0, x1 = _span([x for x, _ in every], panel.log_x, 0.03)
    y0, y1 = _span([y for _, y in every], panel.log_y, 0.06)
    if not panel.log_y and 0 <= min(y for _, y in every) < 0.4 * y1:
        y0 = 0.0

    def across(value: float) -> float:
        value = math.log10(value) if panel.log_x else value
        return _LEFT + (value - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        value = math.log10(value) if panel.log_y else value
        return _HEIGHT - _BOTTOM - (value - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [f"<text class='title' x='{_LEFT}' y='20'>{escape(panel.title)}</text>"]
    for value in _log_ticks(y0, y1) if panel.log_y else ticks(y0, y1, 4):
        parts.append(f"<path class='grid' d='M{_LEFT},{up(value):.1f}H{right}'/>")
        parts.append(f"<text x='{_LEFT - 8}' y='{up(value) + 4:.1f}' text-anchor='end'>{number(value)}</text>")
    own = sorted({x for x, _ in every})
    if not panel.log_x:
        own = ticks(x0, x1, 6)
    elif len(own) > 12:
        own = [10**tick for tick in ticks(x0, x1, 6)]
    for value in own:
        parts.append(f"<text x='{across(value):.1f}' y='{bottom + 18}' text-anchor='middle'>{number(value)}</text>")
    parts.append(f"<path class='axis' d='M{_LEFT},{bottom}H{right}'/>")
    middle = (_LEFT + right) / 2
    parts.append(f"<text x='{middle}' y='{_HEIGHT - 8}' text-anchor='middle'>{escape(panel.x_label)}</text>")
    for label, points in drawn.items():
        if points:
            index = labels.index(label)
            path = "L".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
            parts.append(f"<path class='line' {_look(index)} d='M{path}'/>")
            colour = _COLOURS[index % len(_COLOURS)]
            parts += [f"<circle cx='{across(x):.1f}' cy='{up(y):.1f}' r='3' fill='{colour}'/>" for x, y in points]
    return "".join(parts)
