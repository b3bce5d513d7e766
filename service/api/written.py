"""What somebody has just written, over a picture that may be a second older: who reads next sees it.

Only for whoever wrote; everybody else's answers come from the picture alone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from starlette.concurrency import run_in_threadpool

from autosft.service.board import Board
from autosft.service.values import Item, ItemState

MAX_TEXTS = 256
#: A picture that has not followed by then does not come: what was written is in the database alone.
KEPT_S = 30.0


@dataclass(slots=True)
class Answers:
    """Texts that one picture of the queue determines, made once for all who ask for the same."""

    _board: Board | None = None
    _texts: dict[Hashable, asyncio.Future[str]] = field(default_factory=dict)

    async def get(self, board: Board, key: Hashable, make: Callable[[], str]) -> str:
        """Return the text of this picture under `key`, made in a thread: a long one keeps nobody waiting."""
        if board is not self._board or len(self._texts) >= MAX_TEXTS:
            self._board, self._texts = board, {}
        if (text := self._texts.get(key)) is None:
            text = self._texts[key] = asyncio.ensure_future(run_in_threadpool(make))
        return await asyncio.shield(text)  # whoever asked first may hang up: others wait for it


@dataclass(slots=True)
class Own:
    """The picture of one user with what they have just written, and the answers from it."""

    items: dict[int, tuple[float, float, Item]] = field(default_factory=dict)  # until, written at
    answers: Answers = field(default_factory=Answers)
    _made: tuple[Board, Board] | None = None  # of the last picture

    def over(self, board: Board, now: float) -> Board | None:
        """Return the picture with what was written after it; None once it has all of that."""
        newer = {
            number: (until, at, item)
            for number, (until, at, item) in self.items.items()
            if at > board.at and now < until
        }
        if newer.keys() != self.items.keys():
            self.items, self._made = newer, None
        if not newer:
            return None
        if self._made is None or self._made[0] is not board:
            self._made = board, with_items(board, [item for _, _, item in newer.values()])
        return self._made[1]

    def add(self, item: Item, at: float, until: float) -> None:
        self.items[item.id] = until, at, item
        self._made = None


@dataclass(slots=True)
class Written:
    """What each user has written that the picture may not have yet."""

    _by_user: dict[str, Own] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, user: str, item: Item, *, at: float) -> None:
        """Remember an item as it was written; `at` is a time after that, of the picture's clock."""
        with self._lock:
            self._by_user.setdefault(user, Own()).add(item, at, time.monotonic() + KEPT_S)

    def own(self, user: str, board: Board) -> tuple[Board, Answers] | None:
        """Return a user's picture and its answers, where it differs from everybody's."""
        if user not in self._by_user:
            return None
        with self._lock:
            own = self._by_user.get(user)
            found = None if own is None else own.over(board, time.monotonic())
            if own is None or found is None:
                self._by_user.pop(user, None)
                return None
            return found, own.answers


def with_items(board: Board, items: Sequence[Item]) -> Board:
    """Return a picture with items as they are now; new and moved ones are behind those of their kind."""
    now, moved, gone = list(board.items), [], []
    for item in items:
        position = board.positions.get(item.id)
        if position is not None and _group(board.items[position]) == _group(item):
            now[position] = item
            continue
        moved.append(item)
        if position is not None:
            gone.append(position)
    for position in sorted(gone, reverse=True):
        del now[position]
    for item in sorted(moved, key=attrgetter("id")):
        now.insert(bisect_right(now, _group(item), key=_group), item)
    return replace(board, items=tuple(now))


def _group(item: Item) -> int:
    """Return what the order of a picture goes by first."""
    if item.is_placed:
        return 0
    if item.is_queued:
        return 1
    return 2 if item.state is ItemState.HELD else 3
