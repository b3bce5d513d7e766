"""Items of a server's queue as lines and tables; what is to come is predicted, and says so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from autosft.profiles.units import gib
from autosft.ui.tables import new_table

if TYPE_CHECKING:
    from rich.table import Table


def queue_table(items: list[dict[str, Any]]) -> Table:
    """Return items as a table; times are predicted where they are to come."""
    table = new_table()
    for heading in ("item", "place", "name", "owner", "state", "needs", "start", "end", "why"):
        table.add_column(
            heading, overflow="fold", justify="right" if heading in ("item", "place") else "left"
        )
    for item in items:
        predicted = item["predicted"]
        needs = "" if predicted is None else gib(predicted["bytes_each"])
        if predicted is not None and predicted["num_devices"] > 1:
            needs = f"{predicted['num_devices']} x {needs}"
        state = item["state"]
        if state == "running":
            state = f"running {100 * item['progress']:.0f} %"
        table.add_row(
            str(item["id"]),
            str(item["place"] or ""),
            item["name"],
            item["owner"],
            state,
            needs,
            _time(item["started_at"] if item["place"] is None else None, item["predicted_start"]),
            _time(item["ended_at"], item["predicted_end"]),
            item["reason"] or item["note"].partition("\n")[0],
        )
    return table


def _time(measured: float | None, predicted: float | None) -> str:
    if measured is not None:
        return clock(measured)
    return "" if predicted is None else f"about {clock(predicted)}"


def waiting_text(shown: dict[str, Any]) -> str:
    """Say where an item stands in the queue."""
    if shown["state"] not in ("waiting", "preempted"):
        return f"It is {shown['state']}{': ' + shown['note'] if shown['note'] else ''}."
    place = f"Place {shown['place']}: " if shown["place"] else ""
    return f"{place}{shown['reason']}{times_text(shown)}."


def times_text(shown: dict[str, Any]) -> str:
    """Say when an item is predicted to start and to end."""
    start, end = shown["predicted_start"], shown["predicted_end"]
    said = [f"start {clock(start)}"] if start is not None else []
    said += [f"end {clock(end)}"] if end is not None else []
    return f"; predicted {' and '.join(said)}" if said else ""


def clock(at: float) -> str:
    then = time.localtime(at)
    return time.strftime("%H:%M" if then[:3] == time.localtime()[:3] else "%a %H:%M", then)
