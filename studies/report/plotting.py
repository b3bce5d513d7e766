"""What all figures of a report have in common.

A colour that begins with `@` is a variable of the page (`style.css`), resolved when a figure is drawn, so
that light and dark mode have their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from autosft.profiles.units import GIB

Json = dict[str, Any]
MANY = 100  # from this number of marks on, each is drawn lightly
MIB = 1 << 20


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
