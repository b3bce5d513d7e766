"""The queue of `service.store` in memory, for simulations: what the loop asks of it, without a database."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from autosft.service.values import (
    OPEN_STATES,
    QUEUED_STATES,
    Item,
    ItemState,
    Pace,
    Place,
    Submission,
    Usage,
    User,
)
from autosft.studies.values import Driver

HOUR_S = 3600.0
S = ItemState


@dataclass
class MemoryQueue:
    """Open items in a dictionary, and what is measured of those that have ended."""

    shares: Mapping[str, float] = field(default_factory=dict)
    open: dict[int, Item] = field(default_factory=dict)
    next_id: int = 1
    hours: dict[tuple[str, int], float] = field(default_factory=dict)
    starts: dict[int, float] = field(default_factory=dict)
    longest_waits: dict[int, float] = field(default_factory=dict)
    total_s: dict[str, float] = field(default_factory=dict)
    num_preempted: int = 0
    _num_done: int = 0

    def __post_init__(self) -> None:
        users = tuple(User(name=name, shares=share) for name, share in self.shares.items())
        self.users = SimpleNamespace(list=lambda: users)

    # What the loop asks

    def take_over(self, process: Driver, *, now: float) -> int:
        return 1

    def heartbeat(self, generation: int, *, now: float) -> None: ...

    def items(
        self, states: Collection[ItemState] = OPEN_STATES, *, limit: int | None = None
    ) -> tuple[Item, ...]:
        return tuple(item for item in self.open.values() if item.state in states)

    def states(self, item_ids: Collection[int]) -> dict[int, ItemState]:
        return {}

    def usage(self, *, now: float, half_life_s: float) -> dict[str, Usage]:
        found: dict[str, float] = {}
        for (owner, hour), used_s in self.hours.items():
            age_s = max(0.0, now - (hour + 0.5) * HOUR_S)
            found[owner] = found.get(owner, 0.0) + used_s * 0.5 ** (age_s / half_life_s)
        return {owner: Usage(decayed_s=used_s) for owner, used_s in found.items()}

    def submit(self, submission: Submission, *, now: float) -> tuple[Item, bool]:
        item = Item(
            id=self.next_id,
            name=submission.name,
            owner=submission.owner,
            arguments=submission.arguments,
            state=S.WAITING,
            submitted_at=now,
            queued_at=now,
            demand=submission.demand,
            priority=submission.priority,
        )
        self.next_id += 1
        self.open[item.id] = item
        return item, True

    def book(
        self, item_id: int, place: Place, *, launch: str, generation: int, ends_at: float | None, now: float
    ) -> Item:
        item = self.open[item_id]
        assert item.state in QUEUED_STATES
        waited_s = now - item.queued_at
        self.longest_waits[item_id] = max(waited_s, self.longest_waits.get(item_id, 0.0))
        self.starts.setdefault(item_id, now)
        return self._put(item, state=S.STARTING, place=place, launch=launch, started_at=now, ends_at=ends_at)

    def claim(self, item_id: int, *, launch: str, process: Driver, now: float) -> Item:
        return self._put(self.open[item_id], state=S.RUNNING, process=process, charged_until=now)

    def report(self, paces: Collection[Pace], *, now: float) -> None:
        for pace in paces:
            self._put(self.open[pace.item], progress=pace.progress, ends_at=pace.ends_at)

    def charge(self, item_ids: Collection[int], *, now: float) -> None:
        for item_id in item_ids:
            if (item := self.open.get(item_id)) is not None:
                self._charge(item, now)

    def stop(self, item_id: int, *, launch: str, then: ItemState, note: str, now: float) -> Item:
        self.num_preempted += 1
        return self._put(self.open[item_id], state=S.STOPPING, then=then)

    def end(self, item_id: int, *, to: ItemState, at: float | None, now: float, **_: Any) -> None:
        item = self._charge(self.open[item_id], now if at is None else at)
        if to in OPEN_STATES:
            self._put(
                item,
                state=to,
                place=None,
                process=None,
                launch="",
                then=None,
                queued_at=now,
                charged_until=None,
            )
        else:
            del self.open[item_id]
            self._num_done += 1

    def _put(self, item: Item, **changes: Any) -> Item:
        after = replace(item, **changes)
        self.open[item.id] = after
        return after

    def _charge(self, item: Item, now: float) -> Item:
        if item.place is None or item.charged_until is None or now <= item.charged_until:
            return item
        used_s = (now - item.charged_until) * item.place.rate
        key = item.owner, int(now // HOUR_S)
        self.hours[key] = self.hours.get(key, 0.0) + used_s
        self.total_s[item.owner] = self.total_s.get(item.owner, 0.0) + used_s
        return self._put(item, device_s=item.device_s + used_s, charged_until=now)

    # What is measured

    def num_queued(self, owner: str | None = None) -> int:
        return sum(item.is_queued and owner in (None, item.owner) for item in self.open.values())

    def num_done(self) -> int:
        return self._num_done

    def used_s(self, *, now: float) -> dict[str, float]:
        self.charge(list(self.open), now=now)
        return dict(sorted(self.total_s.items()))

    def first_start(self, item_id: int) -> float | None:
        return self.starts.get(item_id)

    def waits(self, *, now: float) -> list[float]:
        """Return how long each item has waited at a stretch at most, those that still wait included."""
        waits = dict(self.longest_waits)
        for item in self.open.values():
            if item.is_queued:
                waits[item.id] = max(now - item.queued_at, waits.get(item.id, 0.0))
        return list(waits.values())
