"""Two small charts as SVG, for places that show images but run no scripts, such as Optuna's dashboard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from autosft.profiles.recipe import MemoryEstimate
from autosft.profiles.units import gib
from autosft.studies.formatting import format_count, format_number

Point = tuple[float, float]

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 44, 40
_COLOURS = ("#2563c9", "#93a0b0", "#c2701c", "#4f8f6b", "#8a63b8", "#b0893a", "#5f8f9f")


def line_chart(lines: Sequence[tuple[str, Sequence[Point]]], *, x: str, title: str) -> str:
    """Draw named lines over a common horizontal axis; lines without finite points are left out."""
    shown = [
        (name, [point for point in points if math.isfinite(point[1])])
        for name, points in lines
        if any(math.isfinite(value) for _, value in points)
    ]
    if not shown:
        return _picture([_text(_WIDTH / 2, _HEIGHT / 2, "nothing has been measured yet", anchor="middle")])
    xs = [at for _, points in shown for at, _ in points]
    ys = [value for _, points in shown for _, value in points]
    x_low, x_high = min(0.0, *xs) if len(xs) > 1 else 0.0, max(xs) or 1.0
    y_low, y_high = min(ys), max(ys)
    margin = 0.06 * (y_high - y_low) or abs(y_high) * 0.05 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def place(point: Point) -> tuple[float, float]:
        across = (point[0] - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (point[1] - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    parts = [_text(_LEFT, 18, title, weight=600)]
    for i in range(5):
        value = y_low + (y_high - y_low) * i / 4
        _, at = place((x_low, value))
        parts.append(f'<path d="M{_LEFT} {at}H{_WIDTH - _RIGHT}" stroke="#e8e9eb"/>')
        parts.append(_text(_LEFT - 8, at + 4, format_number(value), anchor="end"))
        along = x_low + (x_high - x_low) * i / 4
        parts.append(_text(place((along, y_low))[0], _HEIGHT - 22, format_count(along), anchor="middle"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 6, x, anchor="end"))
    for i, (name, points) in enumerate(shown):
        placed = [place(point) for point in points]
        path = " ".join(f"{across},{up}" for across, up in placed)
        colour = _COLOURS[i % len(_COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(placed) <= 30:
            parts += [f'<circle cx="{across}" cy="{up}" r="3" fill="{colour}"/>' for across, up in placed]
        parts.append(_text(_LEFT + 170 * i, 36, name, colour=colour))
    return _picture(parts)


def memory_chart(estimate: MemoryEstimate, measured_bytes: int | None) -> str:
    """Draw predicted memory by owner, its upper bound, and the measured peak, as bars on one scale."""
    median, upper = estimate.allocated.median_bytes, estimate.allocated.upper_bytes
    most = max(upper, measured_bytes or 0) * 1.04
    width = _WIDTH - _LEFT - _RIGHT

    def along(num_bytes: float) -> float:
        return round(_LEFT + num_bytes / most * width, 1)

    parts = [
        _text(_LEFT, 18, "Memory, predicted and measured", weight=600),
        _text(_LEFT - 8, 76, "predicted", anchor="end"),
    ]
    at = 0
    owners = [(name, num_bytes) for name, num_bytes in estimate.components if num_bytes > 0]
    for i, (name, num_bytes) in enumerate(owners):
        colour = _COLOURS[i % len(_COLOURS)]
        parts.append(
            f'<rect x="{along(at)}" y="56" width="{max(0.5, along(at + num_bytes) - along(at)):.1f}" '
            f'height="30" fill="{colour}"/>'
        )
        row, column = divmod(i, 2)
        parts.append(_text(_LEFT + 280 * column, 200 + 20 * row, f"{name}: {gib(num_bytes)}", colour=colour))
        at += num_bytes
    parts.append(f'<path d="M{along(upper)} 48V150" stroke="#5d6671" stroke-dasharray="3 3"/>')
    parts.append(_text(along(upper) - 4, 44, f"bound {gib(upper)}", anchor="end"))
    parts.append(_text(_LEFT - 8, 126, "measured", anchor="end"))
    if measured_bytes is None:
        parts.append(_text(_LEFT, 126, "nothing has been measured yet"))
    else:
        is_over = measured_bytes > upper
        colour = "#c0453e" if is_over else "#1d2126"
        length = along(measured_bytes) - _LEFT
        parts.append(f'<rect x="{_LEFT}" y="106" width="{length:.1f}" height="30" fill="{colour}"/>')
    said = f"predicted {gib(median)}, at most {gib(upper)}"
    said += "" if measured_bytes is None else f"; measured {gib(measured_bytes)}"
    parts.append(_text(_LEFT, 172, said))
    return _picture(parts)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#5d6671", weight: int = 400
) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )


def _picture(parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )
