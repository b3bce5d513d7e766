"""Transitions of an item inside the caller's transaction."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autosft.profiles.errors import UserError
from autosft.service.store import usage
from autosft.service.store.item_rows import cell, item_from
from autosft.service.values import (
    OPEN_STATES,
    PLACED_STATES,
    QUEUED_STATES,
    Item,
    ItemState,
    Pace,
    Submission,
)
from autosft.studies.store import tables

_ITEMS = tables.service_items


class ItemMovedError(UserError):
    """The item is no longer in a state in which this can be done."""


def one(connection: Connection, item_id: int, *, lock: bool = False) -> Item:
    query = sa.select(_ITEMS).where(_ITEMS.c.id == item_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().one_or_none()
    if row is None:
        raise UserError(f"There is no item {item_id} in the queue.", remedy="autosft queue")
    return item_from(row)


def several(connection: Connection, item_ids: Collection[int]) -> list[Item]:
    """Return items, locked, without those that do not exist."""
    query = sa.select(_ITEMS).where(_ITEMS.c.id.in_(item_ids)).order_by(_ITEMS.c.id).with_for_update()
    return [item_from(row) for row in connection.execute(query).mappings()]


def keyed(connection: Connection, submission: Submission, key: str | None) -> Item | None:
    """Return the item that this key was given to.  Raises UserError if that is another submission."""
    if key is None:
        return None
    query = sa.select(_ITEMS).where(_ITEMS.c.owner == submission.owner, _ITEMS.c.idempotency_key == key)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        return None
    item = item_from(row)
    if item.arguments != submission.arguments or item.name != submission.name:
        raise UserError(
            f"The idempotency key {key!r} was given to item {item.id}, another submission.",
            remedy="Use a new key for each submission.",
        )
    return item


def require(connection: Connection, item_ids: Sequence[int]) -> None:
    if not item_ids:
        return
    known = set(connection.scalars(sa.select(_ITEMS.c.id).where(_ITEMS.c.id.in_(item_ids))))
    if missing := [str(item_id) for item_id in item_ids if item_id not in known]:
        raise UserError(f"There is no item {', '.join(missing)} to wait for.", remedy="autosft queue")


def change(
    connection: Connection,
    item: Item,
    from_states: Collection[ItemState],
    to: ItemState | None,
    *,
    now: float,
    **fields: Any,
) -> Item:
    if item.state not in from_states:
        raise moved_error(item, from_states)
    after = dataclasses.replace(item, **fields, state=item.state if to is None else to)
    changed = {
        field.name: cell(field.name, getattr(after, field.name))
        for field in dataclasses.fields(Item)
        if getattr(after, field.name) != getattr(item, field.name)
    }
    if changed:
        connection.execute(sa.update(_ITEMS).where(_ITEMS.c.id == item.id), changed)
        tell(connection, after, now=now)
    return after


def moved_error(item: Item, from_states: Collection[ItemState]) -> ItemMovedError:
    wanted = " or ".join(sorted(state.value for state in from_states))
    return ItemMovedError(
        f"Item {item.id} ({item.name}) is {item.state.value}, so this cannot be done.",
        remedy=f"It has to be {wanted}.",
    )


def stop(connection: Connection, item: Item, *, then: ItemState, note: str, now: float) -> Item:
    """Ask a placed item to stop; a cancellation is not replaced by less."""
    if item.then is ItemState.CANCELLED:
        return item
    return change(connection, item, PLACED_STATES, ItemState.STOPPING, now=now, then=then, note=note)


def leave_place(
    connection: Connection, item: Item, to: ItemState, *, note: str, was_lost: bool = False, now: float
) -> Item:
    return change(
        connection,
        item,
        PLACED_STATES,
        to,
        now=now,
        place=None,
        process=None,
        launch="",
        then=None,
        ends_at=None,
        charged_until=None,
        queued_at=now if to in QUEUED_STATES else item.queued_at,
        ended_at=None if to in OPEN_STATES else now,
        num_lost=item.num_lost + 1 if was_lost else item.num_lost,
        progress=1.0 if to is ItemState.DONE else item.progress,
        note=note,
    )


def charge(connection: Connection, items: Sequence[Item], *, now: float) -> None:
    """Charge the owners of placed items up to `now`, with a few statements however many there are."""
    used_s = {
        item.id: (now - item.charged_until) * item.place.rate
        for item in items
        if item.charged_until is not None and item.place is not None and now > item.charged_until
    }
    if not used_s:
        return
    charged = sa.update(_ITEMS).where(_ITEMS.c.id == sa.bindparam("item"))
    charged = charged.values(device_s=_ITEMS.c.device_s + sa.bindparam("used_s"), charged_until=now)
    connection.execute(charged, [{"item": item, "used_s": seconds} for item, seconds in used_s.items()])
    by_owner: dict[str, float] = {}
    for item in items:
        by_owner[item.owner] = by_owner.get(item.owner, 0.0) + used_s.get(item.id, 0.0)
    for owner, seconds in sorted(by_owner.items()):  # in one order: no two servers wait for each other
        usage.add(connection, owner, seconds, now=now)


def report(connection: Connection, paces: Sequence[Pace]) -> None:
    """Record how far placed items are; nothing for a start that is over."""
    # Not IN, whose values a statement for many rows cannot have.
    placed = sa.or_(*(_ITEMS.c.state == state.value for state in PLACED_STATES))
    this = (_ITEMS.c.id == sa.bindparam("item")) & (_ITEMS.c.launch == sa.bindparam("its_launch"))
    columns = [
        {"item": one.item, "its_launch": one.launch, "progress": one.progress, "ends_at": one.ends_at}
        for one in paces
    ]
    ahead = [{"item": one.item, "its_launch": one.launch, "num_lost": 0} for one in paces if one.progress > 0]
    connection.execute(sa.update(_ITEMS).where(this & placed), columns)
    if ahead:  # progress ends a row of losses
        connection.execute(sa.update(_ITEMS).where(this & placed & (_ITEMS.c.num_lost > 0)), ahead)


def tell(connection: Connection, item: Item, *, now: float) -> None:
    columns = {"item_id": item.id, "at": now, "state": item.state.value, "note": item.note}
    connection.execute(sa.insert(tables.service_events), columns)
