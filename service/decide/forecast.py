"""When each item will start and end, if all goes as predicted.  Pure.

The queue is played on from now: items end when they are predicted to, and what waits is placed in its present
order, by the rules of `place_items`.  What is not in it: items that are still to be submitted, and that the
order changes as users use devices.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from autosft.scheduler.decide.placement import vacate
from autosft.service.decide.place_items import Queue
from autosft.service.decide.shares import Block
from autosft.service.decide.situation import Situation, predicted_end, way_of
from autosft.service.values import Item, ItemState, Place

#: Items that may overtake the first one that waits, at each end of another.
MAX_BEHIND = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A start that is predicted."""

    starts_at: float
    ends_at: float
    place: Place
    follows: int | None  # the item whose end makes room; None: it can start at once


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
    waiting: list[Item]
    later: list[Item]  # blocked by a time or by other items
    ends: list[tuple[float, int]]
    planned: dict[int, Planned]
    ended: dict[int, ItemState]


def forecast(situation: Situation) -> Forecast:
    """Return when items are predicted to start and end; those that no end makes room for are left out."""
    queue = Queue(situation, max_behind=MAX_BEHIND)
    running = {
        item.id: predicted_end(item, situation) for item in situation.items if item.place and item.is_placed
    }
    places = {item.id: (way_of(item).kind, item.place) for item in situation.items if item.id in running}
    order = list(queue.in_order())
    course = _Course(
        now=situation.now,
        waiting=order,
        later=[item for item in situation.items if queue.blocks.get(item.id) in _PASSING],
        ends=[(ends_at, item_id) for item_id, ends_at in running.items()],
        planned={},
        ended=dict(situation.ended),
    )
    course.ends += [(item.not_before, -1) for item in course.later if item.not_before is not None]
    heapq.heapify(course.ends)
    owners = {item.id: item.owner for item in situation.items}
    _start(queue, course, places, ended=())
    blocks, first, reserved = dict(queue.blocks), queue.filling.first_waiting, queue.filling.reserved
    while course.ends and (course.waiting or course.later):
        over = [heapq.heappop(course.ends)]
        while course.ends and course.ends[0][0] <= over[0][0] + 1.0:  # ends of the same moment together
            over.append(heapq.heappop(course.ends))
        course.now = max(course.now, over[-1][0])
        ended = [item_id for _, item_id in over if item_id >= 0]
        for item_id in ended:
            kind, place = places[item_id]
            assert place is not None
            vacate(queue.kinds, kind, item_id, place.device_uuids)
            queue.standings[owners[item_id]].num_devices -= len(place.device_uuids)
            course.ended[item_id] = ItemState.DONE
        _arrive(course)
        _start(queue, course, places, ended=ended)
    return Forecast(
        order=tuple(item.id for item in order),
        planned=course.planned,
        blocks=blocks,
        running=running,
        kept_for=None if first is None else first.trial,
        kept=frozenset() if reserved is None else reserved.device_uuids,
    )


_PASSING = (Block.NOT_BEFORE, Block.AFTER)


def _arrive(course: _Course) -> None:
    """Put items into the queue whose time has come, or whose predecessors are done; behind the others."""
    arrived = [item for item in course.later if _is_due(item, course)]
    if arrived:
        course.later = [item for item in course.later if not _is_due(item, course)]
        course.waiting = [*course.waiting, *sorted(arrived, key=lambda item: (-item.priority, item.id))]


def _is_due(item: Item, course: _Course) -> bool:
    is_time = item.not_before is None or item.not_before <= course.now
    return is_time and all(course.ended.get(other) is ItemState.DONE for other in item.after)


def _start(
    queue: Queue,
    course: _Course,
    places: dict[int, tuple[str, Place | None]],
    *,
    ended: Iterable[int],
) -> None:
    """Start what can start at this moment, and plan its end."""
    queue.begin(course.now, num_waiting=len(course.waiting))
    freed = {
        uuid: item_id
        for item_id in ended
        if (place := places[item_id][1]) is not None
        for uuid in place.device_uuids
    }
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
        course.planned[item.id] = Planned(
            starts_at=course.now, ends_at=start.ends_at, place=start.place, follows=follows
        )
        assert item.demand is not None
        places[item.id] = (item.demand.ways[start.place.way].kind, start.place)
        heapq.heappush(course.ends, (start.ends_at, item.id))
    course.waiting = left
