"""Live events: what has changed between two pictures of the queue, to everybody who listens.

A listener that is too slow loses events, and is told so (`missed`): it reads the queue again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autosft.service.board import Board
from autosft.service.values import Item, Role, User

#: Events that wait for one listener, and listeners.
MAX_WAITING, MAX_LISTENERS = 256, 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """One event."""

    number: int
    kind: str  # "item", "trial", "queue", "devices", "missed"
    data: Mapping[str, Any]


@dataclass(slots=True)
class _Listener:
    user: User
    waiting: asyncio.Queue[Happened | None]
    loop: asyncio.AbstractEventLoop
    missed: bool = False


@dataclass(slots=True)
class Hub:
    """Hands events to listeners; `publish` and `tell` may be called from any thread."""

    _listeners: list[_Listener] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _last: Board = field(default_factory=Board)
    is_closed: bool = False

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    def publish(self, board: Board) -> None:
        """Tell what has changed since the last picture."""
        before, self._last = self._last, board
        for kind, owner, data in changes(before, board):
            self.tell(kind, owner, data)

    def tell(self, kind: str, owner: str | None, data: Mapping[str, Any]) -> None:
        """Hand one event to those who may see it; `owner` None: to all."""
        event = Happened(number=next(self._numbers), kind=kind, data=data)
        for listener in list(self._listeners):
            if owner is None or owner == listener.user.name or listener.user.role is Role.ADMIN:
                with contextlib.suppress(RuntimeError):  # its loop has ended
                    listener.loop.call_soon_threadsafe(_put, listener, event)

    def close(self) -> None:
        """End all streams: the server stops."""
        self.is_closed = True
        for listener in list(self._listeners):
            with contextlib.suppress(RuntimeError):
                listener.loop.call_soon_threadsafe(listener.waiting.put_nowait, None)

    async def listen(self, user: User) -> AsyncIterator[Happened]:
        """Yield what a user may see, from now on."""
        listener = _Listener(user, asyncio.Queue(), asyncio.get_running_loop())
        self._listeners.append(listener)
        try:
            while not self.is_closed:
                event = await listener.waiting.get()
                if event is None:
                    return
                yield event
                if listener.missed and listener.waiting.empty():
                    listener.missed = False
                    yield Happened(number=event.number, kind="missed", data={})
        finally:
            self._listeners.remove(listener)


def _put(listener: _Listener, event: Happened) -> None:
    if listener.waiting.qsize() >= MAX_WAITING:
        listener.missed = True
    else:
        listener.waiting.put_nowait(event)


def changes(before: Board, after: Board) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Yield what has changed: kind, whose, and the new values."""
    known = {item.id: item for item in before.items}
    for item in after.items:
        old = known.get(item.id)
        if old is item:
            continue
        if old is None and item.is_ended and (item.ended_at or 0.0) < before.at:
            continue  # an old one that came into sight
        if old is None or told(old) != told(item):
            yield "item", item.owner, {"id": item.id, "name": item.name, **told(item)}
    if after.places() != before.places():
        yield "queue", None, {"length": len(after.places())}
    if after.devices != before.devices:
        yield "devices", None, {}


def told(item: Item) -> dict[str, Any]:
    """Return what of an item is an event where it changes."""
    return {
        "state": item.state.value,
        "progress": round(item.progress, 4),
        "note": item.note,
        "priority": item.priority,
    }
