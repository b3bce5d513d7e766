"""What all figures of a report have in common.

A colour that begins with `@` is a variable of the page (`style.css`), resolved when a figure is drawn, so
that light and dark mode have their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autosft.profiles.units import GIB

Json = dict[str, Any]
MANY = 100  # from this number of marks on, each is drawn lightly
MIB = 1 << 20
MIN_TICKS, MAX_TICKS = 3, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure in a section of the report."""

    name: str  # id on the page
    caption: str
    height_px: int
    data: list[Json]
    layout: Json


def dots(num: int) -> Json:
    """Return size and opacity for a number of dots."""
    return {"size": 8, "opacity": 0.85} if num < MANY else {"size": 5, "opacity": 0.5}


def log_ticks(low: float, high: float) -> list[float]:
    """Return three to a dozen round values from `low` to `high`, for a logarithmic axis.

    1, 2 and 5 of each decade, all nine digits where these are fewer than three, further digits in between
    where a range is narrower still; every decade only where there are many.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)

    def within(digits: list[float]) -> list[float]:
        marks = (float(f"{digit * 10.0**decade:.6g}") for decade in decades for digit in digits)
        return [mark for mark in marks if low * (1 - 1e-9) <= mark <= high * (1 + 1e-9)]

    steps = ([1.0], [1.0, 2.0, 5.0], [float(digit) for digit in range(1, 10)])
    finer = [[1 + step * k for k in range(round(9 / step))] for step in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)]
    for digits in (*steps, *finer):
        if len(marks := within(digits)) >= MIN_TICKS:
            break
    return marks[:: math.ceil(len(marks) / MAX_TICKS)] if marks else []


def tick_text(value: float) -> str:
    """Return a tick as text, small ones as 1.5e-4."""
    if value >= 1e-2:
        return f"{value:g}"
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def with_log_ticks(axis: Json, values: Iterable[float]) -> Json:
    """Return a logarithmic axis with ticks for these values, and room beside the outermost."""
    low, high = min(values := list(values)), max(values)
    ticks = log_ticks(low * 0.9, high * 1.1)
    room = max(0.03, 0.05 * math.log10(high / low))
    ends = [math.log10(low) - room, math.log10(high) + room]
    return axis | {"tickvals": ticks, "ticktext": [tick_text(tick) for tick in ticks], "range": ends}


def layout_of(*, x: str | None, y: str | None, x_log: bool = False, y_log: bool = False) -> Json:
    def axis(title: str | None, is_log: bool) -> Json:
        return {
            **({"title": {"text": title, "standoff": 8}} if title else {}),
            # Only 1, 2 and 5 are labelled on a logarithmic axis.
            **({"type": "log", "dtick": "D2", "exponentformat": "e"} if is_log else {}),
            "gridcolor": "@grid",
            "linecolor": "@grid",
            "zeroline": False,
            "automargin": True,
            "ticks": "",
        }

    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@muted", "size": 12, "family": "inherit"},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "xaxis": axis(x, x_log),
        "yaxis": axis(y, y_log),
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "@card", "bordercolor": "@grid", "font": {"color": "@text"}},
    }


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def short(value: float | None) -> float | None:
    """Round a number to five digits: a page of a thousand trials need not hold seventeen."""
    return None if value is None else float(f"{value:.5g}")


def unit_for(most_bytes: int) -> tuple[str, int]:
    return ("GiB", GIB) if most_bytes >= GIB else ("MiB", MIB)
