"""When each item will start and end, if all goes as predicted.  Pure.

The queue is played on from now: items end when they are predicted to, and what waits is placed in its present
order, by the rules of `place_items`, with what is likely to be submitted meanwhile (`expected`).  What is not
in it: preemption, and that the order changes as users use devices.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autosft.scheduler.decide.placement import vacate
from autosft.scheduler.decide.sharing import slowdown
from autosft.service.decide.expected import is_expected
from autosft.service.decide.place_items import Queue
from autosft.service.decide.shares import Block
from autosft.service.decide.situation import Situation, predicted_ends, way_of
from autosft.service.values import Item, ItemState, Place

#: Items that may overtake the first one that waits, at each end of another.
MAX_BEHIND = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A start that is predicted."""

    starts_at: float
    ends_at: float
    place: Place
    follows: (
        int | None
    )  # the item whose end makes room, negative: an expected one; None: it can start at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The predicted course of the queue."""

    order: tuple[int, ...]  # of the items that are considered now
    planned: dict[int, Planned]
    blocks: dict[int, Block]  # of those that are not considered, or not before others end
    running: dict[int, float]  # predicted ends
    kept_for: int | None = None  # the first item that waits
    kept: frozenset[str] = frozenset()  # devices that are kept for it now


@dataclass(slots=True)
class _Course:
    """The play, as it goes on."""

    now: float
    waiting: list[Item]  # in their order
    later: list[Item]  # blocked by a time or by other items
    ranks: dict[int, int]  # in the order of all
    ends_at: dict[int, float]  # of what runs, and of what has run
    places: dict[int, tuple[str, Place]]  # with the kind of their devices
    starts: dict[int, tuple[float, int | None]]  # of those that start: when, and whom they follow
    ended: dict[int, ItemState]
    due: list[tuple[float, int]]  # what happens when: an end, or (-1) a time that an item waits for

    def plan_end(self, item_id: int, at: float) -> None:
        """Have an item end then, and not when it was to before."""
        self.ends_at[item_id] = at
        heapq.heappush(self.due, (at, item_id))

    def is_moot(self, at: float, item_id: int) -> bool:
        """Whether an end that was planned is none any more: the item ends at another time."""
        return item_id >= 0 and self.ends_at[item_id] != at

    def has_more(self) -> bool:
        """Whether anything is left that was really submitted."""
        return any(not is_expected(item.id) for several in (self.waiting, self.later) for item in several)

    def next_at(self) -> float | None:
        """Return when something happens next."""
        while self.due and self.is_moot(*self.due[0]):
            heapq.heappop(self.due)
        return self.due[0][0] if self.due else None


def forecast(situation: Situation, expected: Sequence[Item] = ()) -> Forecast:
    """Return when items are predicted to start and end; those that no end makes room for are left out.

    `expected` are likely to be submitted at their `not_before`.
    """
    situation = replace(situation, items=(*situation.items, *expected))
    queue = Queue(situation, max_behind=MAX_BEHIND)
    course = _begun(situation, queue)
    order, running = tuple(item.id for item in course.waiting), tuple(course.places)
    owners = {item.id: item.owner for item in situation.items}
    _start(queue, course, ended=())
    blocks, first, reserved = dict(queue.blocks), queue.filling.first_waiting, queue.filling.reserved
    while (at := course.next_at()) is not None:
        ended = []
        while (following := course.next_at()) is not None and following <= at + 1.0:  # of the same moment
            course.now, item_id = max(course.now, following), heapq.heappop(course.due)[1]
            if item_id >= 0:
                ended.append(item_id)
                _end(queue, course, item_id, owners[item_id])
        if course.has_more():
            _arrive(course)
            _start(queue, course, ended=ended)
    return Forecast(
        order=order,
        planned={
            item_id: Planned(
                starts_at=starts_at,
                ends_at=course.ends_at[item_id],
                place=course.places[item_id][1],
                follows=follows,
            )
            for item_id, (starts_at, follows) in course.starts.items()
            if not is_expected(item_id)
        },
        blocks={item_id: block for item_id, block in blocks.items() if not is_expected(item_id)},
        running={item_id: course.ends_at[item_id] for item_id in running},
        kept_for=None if first is None else first.trial,
        kept=frozenset() if reserved is None else reserved.device_uuids,
    )


def _begun(situation: Situation, queue: Queue) -> _Course:
    """Return the play at its beginning."""
    ends_at = predicted_ends(situation)
    later = [item for item in situation.items if queue.blocks.get(item.id) in _PASSING]
    ordered = list(queue.in_order(later))
    blocked = {item.id for item in later}
    course = _Course(
        now=situation.now,
        waiting=[item for item in ordered if item.id not in blocked],
        later=later,
        ranks={item.id: rank for rank, item in enumerate(ordered)},
        ends_at=ends_at,
        places={
            item.id: (way_of(item).kind, item.place)
            for item in situation.items
            if item.id in ends_at and item.place is not None
        },
        starts={},
        ended=dict(situation.ended),
        due=[(at, item_id) for item_id, at in ends_at.items()],
    )
    course.due += [(item.not_before, -1) for item in later if item.not_before is not None]
    heapq.heapify(course.due)
    return course


def _end(queue: Queue, course: _Course, item_id: int, owner: str) -> None:
    """Take an item from its devices; what is left on them has more of their time."""
    kind, place = course.places[item_id]
    before = _slowness(queue, kind, place)
    vacate(queue.kinds, kind, item_id, place.device_uuids)
    _reckon(queue, course, item_id, before)
    queue.standings[owner].num_devices -= len(place.device_uuids)
    course.ended[item_id] = ItemState.DONE


def _slowness(queue: Queue, kind: str, place: Place) -> float:
    """Return the factor by which items on a shared device are slower than alone."""
    state = queue.kinds[kind].state(place.device_uuids[0])
    return slowdown(state.load, len(state.residents), state.overhead)


def _reckon(queue: Queue, course: _Course, changed: int, before: float) -> None:
    """Plan the ends of those again that share a device with an item which has come or gone."""
    kind, place = course.places[changed]
    if len(place.device_uuids) > 1:
        return  # a gang has its devices to itself
    [uuid] = place.device_uuids
    ratio = _slowness(queue, kind, place) / before
    if abs(ratio - 1.0) < 1e-9:
        return
    residents = []
    for one in queue.kinds[kind].state(uuid).residents:
        if one.trial != changed:
            at = course.now + max(0.0, one.ends_at - course.now) * ratio
            course.plan_end(one.trial, at)
            one = one._replace(ends_at=at)  # noqa: PLW2901
        residents.append(one)
    queue.kinds[kind].change(uuid, tuple(residents))


_PASSING = (Block.NOT_BEFORE, Block.AFTER)


def _arrive(course: _Course) -> None:
    """Put items into their place in the queue whose time has come, or whose predecessors are done."""
    arrived = [item for item in course.later if _is_due(item, course)]
    if arrived:
        course.later = [item for item in course.later if not _is_due(item, course)]
        course.waiting = sorted([*course.waiting, *arrived], key=lambda item: course.ranks[item.id])


def _is_due(item: Item, course: _Course) -> bool:
    is_time = item.not_before is None or item.not_before <= course.now
    return is_time and all(course.ended.get(other) is ItemState.DONE for other in item.after)


def _start(queue: Queue, course: _Course, *, ended: Iterable[int]) -> None:
    """Start what can start at this moment, and plan its end."""
    queue.begin(course.now, num_waiting=len(course.waiting))
    freed = {uuid: item_id for item_id in ended for uuid in course.places[item_id][1].device_uuids}
    left: list[Item] = []
    for position, item in enumerate(course.waiting):
        start = queue.offer(item)
        if start is None:
            left.append(item)
            if queue.filling.is_over:
                left += course.waiting[position + 1 :]
                break
            continue
        follows = next((freed[uuid] for uuid in start.place.device_uuids if uuid in freed), None)
        if follows is None:
            follows = next(iter(freed.values()), None)
        assert item.demand is not None
        way = item.demand.ways[start.place.way]
        course.starts[item.id] = course.now, follows
        course.places[item.id] = way.kind, start.place
        course.plan_end(item.id, start.ends_at)
        state = queue.kinds[way.kind].state(start.place.device_uuids[0])
        before = slowdown(state.load - way.load, len(state.residents) - 1, state.overhead)
        _reckon(queue, course, item.id, before)
    course.waiting = left
