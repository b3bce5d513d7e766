"""Conversion between rows of the service's tables and frozen values."""

from __future__ import annotations

import functools
import json
from typing import Any

import sqlalchemy as sa

from autosft.service.values import Arguments, Demand, Item, ItemState, Place, Role, Submission, User
from autosft.studies.values import Driver
from autosft.studies.wire import from_plain, to_plain

#: Fields of an item whose columns hold JSON.
_JSON: dict[str, type] = {"arguments": Arguments, "demand": Demand, "place": Place, "process": Driver}


def dump(value: object) -> str:
    return json.dumps(to_plain(value), ensure_ascii=False)


def cell(name: str, value: object) -> object:
    """Return the column value of an item's field."""
    if isinstance(value, ItemState):
        return value.value
    if name == "after" or (name in _JSON and value is not None):
        return dump(value)
    return value


@functools.lru_cache(maxsize=4096)  # of two thousand open items the arguments and the processes
def _load(kind: type, text: str) -> object:
    """Read a JSON column; kept, since the loop reads the same items each second."""
    return from_plain(kind, json.loads(text))


def submission_columns(submission: Submission, *, now: float) -> dict[str, Any]:
    """Return the columns of a new item."""
    state = ItemState.HELD if submission.is_held else ItemState.WAITING
    note = "Held when it was submitted." if submission.is_held else ""
    if submission.refusal:
        state, note = ItemState.REFUSED, submission.refusal
    given = ("name", "owner", "arguments", "demand", "priority", "not_before", "after", "may_share")
    columns = {name: cell(name, getattr(submission, name)) for name in (*given, "cloned_from")}
    return {
        **columns,
        "state": state.value,
        "note": note,
        "submitted_at": now,
        "queued_at": now,
        "ended_at": now if state is ItemState.REFUSED else None,
        "launch": "",
        "num_starts": 0,
        "num_lost": 0,
        "progress": 0.0,
        "device_s": 0.0,
    }


def item_from(row: sa.RowMapping) -> Item:
    values = {name: row[name] for name in row if name != "idempotency_key"}
    for name, kind in _JSON.items():
        if values[name] is not None:
            values[name] = _load(kind, values[name])
    return Item(
        **{
            **values,
            "after": tuple(json.loads(row["after"])),
            "state": ItemState(row["state"]),
            "then": None if row["then"] is None else ItemState(row["then"]),
        }
    )


def user_from(row: sa.RowMapping) -> User:
    return User(
        name=row["name"],
        role=Role(row["role"]),
        shares=row["shares"],
        max_devices=row["max_devices"],
        device_hours_a_week=row["device_hours_a_week"],
        is_revoked=row["revoked_at"] is not None,
    )
