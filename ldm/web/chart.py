"""Charts as inline SVG and HTML that follow the page's colours in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 1040, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 44
_COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """A named line; `smooth` in [0, 1) draws its running mean strongly and the raw values faintly behind it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: float = 0.0


@dataclass(frozen=True)
class Bar:
    """A value with its interval and a reference such as the chance level; all in the unit of the chart."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class _Frame:
    """The map from data to the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float
    log_y: bool

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        if self.log_y:
            value = math.log10(value)
        share = (value - self.y0) / (self.y1 - self.y0)
        return _HEIGHT - _BOTTOM - min(1.05, max(-0.05, share)) * (_HEIGHT - _TOP - _BOTTOM)


def line_chart(curves: Sequence[Curve], x_label: str, y_label: str, log_y: bool = False) -> str:
    """An SVG of the curves with axes and a legend.

    Points that are not finite (or not positive on a log axis) are left out. Raises ValueError when no point is left.
    """
    drawn = [(curve, _points(curve, log_y)) for curve in curves]
    everything = [p for _, points in drawn for p in points]
    if not everything:
        raise ValueError(f"chart {y_label!r}: no finite point in any of {[c.label for c in curves]}")
    # A smoothed curve may leave a few outliers of its raw values outside the frame.
    visible = [p for curve, points in drawn for p in (smoothed(points, curve.smooth) if curve.smooth else points)]
    frame = _frame(everything, visible, log_y)
    parts = [_axes(frame, x_label, y_label)]
    for number, (curve, points) in enumerate(drawn):
        colour = f"style='stroke:var(--c{number % _COLOURS})'"
        if curve.smooth:
            parts.append(f"<path class='raw' {colour} d='{_path(points, frame)}'/>")
        parts.append(f"<path {colour} d='{_path(smoothed(points, curve.smooth), frame)}'/>")
    keys = "".join(
        f"<span><i style='background:var(--c{i % _COLOURS})'></i>{escape(c.label)}</span>" for i, c in enumerate(curves)
    )
    legend = f"<div class='legend'>{keys}</div>" if len(curves) > 1 else ""
    names = escape(", ".join(c.label for c in curves), quote=True)
    svg = f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{names}'>{''.join(parts)}</svg>"
    return f"<div class='chart'>{legend}{svg}</div>"


def bar_chart(bars: Sequence[Bar], unit: str = "%", top: float | None = None) -> str:
    """Horizontal bars from 0 to `top` (the largest value or interval end when not given)."""
    if top is None:
        top = max([1e-9, *(b.value for b in bars), *(b.high for b in bars if b.high is not None)])
    return f"<div class='bars'>{''.join(_bar(b, unit, top) for b in bars)}</div>"


def _bar(bar: Bar, unit: str, top: float) -> str:
    def at(value: float) -> float:
        return round(100 * min(max(value / top, 0), 1), 3)

    parts = [f"<span class='fill' style='width:{at(bar.value)}%'></span>"]
    if bar.low is not None and bar.high is not None:
        parts.append(
            f"<span class='whisker' style='left:{at(bar.low)}%;width:{at(bar.high) - at(bar.low):.3f}%'></span>"
        )
    if bar.reference is not None:
        parts.append(f"<span class='mark' style='left:{at(bar.reference)}%'></span>")
    note = f"<small>{escape(bar.note)}</small>" if bar.note else ""
    value = f"<span class='value'>{number(bar.value)} {escape(unit)}{note}</span>"
    return f"<span class='label'>{escape(bar.label)}</span><span class='track'>{''.join(parts)}</span>{value}"


def smoothed(points: Sequence[tuple[float, float]], weight: float) -> list[tuple[float, float]]:
    """Exponential running mean, without the bias of its start."""
    out, mean, total = [], 0.0, 0.0
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        out.append((x, mean / total))
    return out


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short form: 12 000, 3.4, 0.015."""
    if value == 0 or (abs(value) >= 1 and float(value).is_integer()):
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:,.0f}".replace(",", "\u202f") if abs(value) >= 1000 else f"{value:.3g}"


def _points(curve: Curve, log_y: bool) -> list[tuple[float, float]]:
    pairs = [(float(x), float(y)) for x, y in zip(curve.x, curve.y, strict=True)]
    pairs = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
    most = 1500  # more points than pixels only make the file larger
    step = math.ceil(len(pairs) / most) if pairs else 1
    if step == 1:
        return pairs
    groups = [pairs[i : i + step] for i in range(0, len(pairs), step)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _frame(points: list[tuple[float, float]], visible: list[tuple[float, float]], log_y: bool) -> _Frame:
    xs = [x for x, _ in points]
    ys = sorted(math.log10(y) if log_y else y for _, y in [*visible, *points])
    low, high = ys[int(0.002 * (len(ys) - 1))], ys[math.ceil(0.998 * (len(ys) - 1))]
    if not log_y and 0 <= low < 0.4 * high:
        low = 0.0
    pad = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    x0, x1 = min(xs), max(xs)
    return _Frame(x0, x1 if x1 > x0 else x0 + 1, low - (pad if low else 0), high + pad, log_y)


def _path(points: Sequence[tuple[float, float]], frame: _Frame) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _axes(frame: _Frame, x_label: str, y_label: str) -> str:
    parts = []
    bottom = _HEIGHT - _BOTTOM
    for tick in ticks(frame.y0, frame.y1, 4):
        y = frame.y(10**tick if frame.log_y else tick)
        label = number(10**tick) if frame.log_y else number(tick)
        parts.append(f"<line class='gridline' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{_LEFT - 10}' y='{y + 4:.1f}' text-anchor='end'>{label}</text>")
    for tick in ticks(frame.x0, frame.x1, 7):
        parts.append(f"<text x='{frame.x(tick):.1f}' y='{bottom + 20}' text-anchor='middle'>{number(tick)}</text>")
    centre = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f"<text x='{centre}' y='{_HEIGHT - 4}' text-anchor='middle'>{escape(x_label)}</text>")
    middle = (_TOP + bottom) / 2
    parts.append(f"<text transform='translate(12 {middle}) rotate(-90)' text-anchor='middle'>{escape(y_label)}</text>")
    return "".join(parts)
