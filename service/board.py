"""What the server shows of its queue: one frozen picture, made after each decision and read by everybody.

Reading it takes no database and no lock, so that a thousand readers cost the scheduler nothing.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The queue at one moment."""

    at: float = 0.0  # UNIX seconds
    items: tuple[Item, ...] = ()  # open ones in the order of the queue, then ended ones, the newest first
    reasons: Mapping[int, Reason] = field(default_factory=dict)
    devices: tuple[DeviceUse, ...] = ()
    is_draining: bool = False  # nothing starts any more

    def places(self) -> dict[int, int]:
        """Return the place of each item that waits, from 1."""
        queued = [item.id for item in self.items if item.is_queued and item.id in self.reasons]
        return {item: number for number, item in enumerate(queued, start=1)}

    def seen_by(self, user: User) -> tuple[Item, ...]:
        """Return what a user may see."""
        return tuple(item for item in self.items if user.role is Role.ADMIN or item.owner == user.name)


def board_of(
    items: Sequence[Item],
    ended: Sequence[Item],
    waits: Sequence[tuple[int, Reason]],
    devices: Sequence[DeviceUse],
    *,
    now: float,
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
        items=(*sorted(items, key=place), *latest),
        reasons=reasons,
        devices=tuple(devices),
        is_draining=is_draining,
    )
