"""What the server shows of its queue: one frozen picture, made after each decision and read by everybody.

Reading it takes no database and no lock, so that a thousand readers cost the scheduler nothing.  From the
scheduler's process to the one that answers go only the changes: `difference` and `applied` are inverse.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autosft.service.values import Device, Item, ItemState, Reason, Role, User

#: Number of ended items that are shown; the database has them all.
MAX_ENDED = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """A device and who holds its memory, in bytes."""

    device: Device
    booked: tuple[tuple[int, int], ...] = ()  # (item, upper bound), predicted
    measured: tuple[tuple[int, int], ...] = ()  # (item, what its processes hold now)
    others_bytes: int = 0  # measured: processes that are not ours
    free_bytes: int = 0  # measured
    is_measured: bool = True  # False for other nodes: what others hold and is free was seen when they joined


@dataclass(frozen=True, kw_only=True)
class Board:
    """The queue at one moment."""

    at: float = 0.0  # UNIX seconds
    looked_at: float = float("-inf")  # when the loop had last looked at the queue
    items: tuple[Item, ...] = ()  # open ones in the order of the queue, then ended ones, the newest first
    reasons: Mapping[int, Reason] = field(default_factory=dict)
    devices: tuple[DeviceUse, ...] = ()
    is_draining: bool = False  # nothing starts any more

    def places(self) -> Mapping[int, int]:
        """Return the place of each item that waits, from 1."""
        return self._places

    @functools.cached_property
    def _places(self) -> Mapping[int, int]:
        queued = [item.id for item in self.items if item.is_queued and item.id in self.reasons]
        return {item: number for number, item in enumerate(queued, start=1)}

    def seen_by(self, user: User) -> tuple[Item, ...]:
        """Return what a user may see."""
        if user.role is Role.ADMIN:
            return self.items
        return tuple(item for item in self.items if item.owner == user.name)

    @functools.cached_property
    def positions(self) -> Mapping[int, int]:
        """Where each item is in `items`, by its id."""
        return {item.id: position for position, item in enumerate(self.items)}


def board_of(
    items: Sequence[Item],
    ended: Sequence[Item],
    waits: Sequence[tuple[int, Reason]],
    devices: Sequence[DeviceUse],
    *,
    now: float,
    looked_at: float = float("-inf"),
    is_draining: bool = False,
) -> Board:
    """Return the picture after a decision: what runs, what waits in its order, what else there is.

    `waits` says why each item waits, in the order of the queue.
    """
    reasons = dict(waits)
    order = {item: number for number, (item, _) in enumerate(waits)}

    def place(item: Item) -> tuple[int, int, int]:
        if item.is_placed:
            return 0, 0, item.id
        if item.id in order:
            return 1, order[item.id], item.id
        return (3 if item.state is ItemState.HELD else 2), 0, item.id

    latest = sorted(ended, key=lambda item: (item.ended_at or 0.0, item.id), reverse=True)[:MAX_ENDED]
    return Board(
        at=now,
        looked_at=looked_at,
        items=(*sorted(items, key=place), *latest),
        reasons=reasons,
        devices=tuple(devices),
        is_draining=is_draining,
    )


# From one process to another


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What makes the next picture of one; `None` is as before."""

    at: float
    looked_at: float
    items: tuple[Item, ...]  # new, or not as before
    order: tuple[int, ...] | None  # ids of all items that are shown
    reasons: Mapping[int, Reason | None]  # new, or not as before; None: it has none any more
    devices: tuple[DeviceUse, ...] | None
    is_draining: bool


def difference(before: Board, after: Board) -> Change:
    """Return what `applied` makes `after` of `before` with."""
    known = {item.id: item for item in before.items}
    order = tuple(item.id for item in after.items)
    reasons: dict[int, Reason | None] = dict.fromkeys(before.reasons.keys() - after.reasons.keys())
    reasons |= {item: reason for item, reason in after.reasons.items() if before.reasons.get(item) != reason}
    return Change(
        at=after.at,
        looked_at=after.looked_at,
        items=tuple(item for item in after.items if known.get(item.id) != item),
        order=None if order == tuple(known) else order,
        reasons=reasons,
        devices=None if after.devices == before.devices else after.devices,
        is_draining=after.is_draining,
    )


def applied(before: Board, change: Change) -> Board:
    """Return the picture after a change; what has not changed is the same object."""
    known = {item.id: item for item in before.items}
    order = tuple(known) if change.order is None else change.order
    known |= {item.id: item for item in change.items}
    reasons = {**before.reasons, **change.reasons} if change.reasons else before.reasons
    return Board(
        at=change.at,
        looked_at=change.looked_at,
        items=tuple(known[number] for number in order),
        reasons={item: reason for item, reason in reasons.items() if reason is not None},
        devices=before.devices if change.devices is None else change.devices,
        is_draining=change.is_draining,
    )
