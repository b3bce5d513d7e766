"""Whose turn is it: the order of the queue, and what keeps an item out of it.

The order: items that an admin has moved; items that have waited for `Policy.max_wait_s`, the oldest first;
then by priority, the highest first; among equals, the user with the fewest device-seconds per share, and
their oldest item.  What counts as used is halved with each half-life; the rest of what runs is counted as
used already, and so is each item that is before.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

from autosft.service.decide.situation import HOUR_S, Situation, remaining_s
from autosft.service.values import Item, ItemState


class Block(enum.Enum):
    """What keeps an item that is queued from being considered."""

    NOT_PLANNED = "not planned"  #: what it needs is not known yet
    NOT_BEFORE = "not before"  #: its owner gave a time
    AFTER = "after"  #: it follows items that are not done
    NO_DEVICE = "no device"  #: no device of its kinds is here, or none is large enough
    DEVICE_QUOTA = "devices at once"  #: its owner has as many devices as they may have
    HOUR_QUOTA = "device-hours a week"  #: its owner has used what they may use in a week


@dataclass(slots=True)
class Standing:
    """What a user has and has used, as a decision proceeds."""

    share: float
    used_s: float  # decayed, with the rest of what runs and what is before in the queue
    week_s: float
    num_devices: int = 0

    @property
    def key(self) -> float:
        return self.used_s / self.share


def standings(situation: Situation, ends: Mapping[int, float]) -> dict[str, Standing]:
    """Return where each owner of an open item stands; `ends` are those of placed items, predicted."""
    found: dict[str, Standing] = {}
    for owner in {item.owner for item in situation.items}:
        usage = situation.usage.get(owner)
        found[owner] = Standing(
            share=situation.user(owner).shares,
            used_s=0.0 if usage is None else usage.decayed_s,
            week_s=0.0 if usage is None else usage.week_s,
        )
    for item in situation.items:
        if item.place is not None and item.id in ends:
            standing = found[item.owner]
            left_s = item.place.rate * max(0.0, ends[item.id] - situation.now)
            standing.used_s += left_s
            standing.week_s += left_s
            standing.num_devices += len(item.place.device_uuids)
    return found


def device_s(item: Item) -> float:
    """Return the device-seconds that are left of an item, run the narrowest way."""
    assert item.demand is not None
    way = item.demand.narrowest
    return way.width * remaining_s(item, way) * (way.load if way.may_share and item.may_share else 1.0)


def block_of(item: Item, situation: Situation) -> Block | None:
    """Return what keeps a queued item out of the order, except quotas and devices; None if nothing does."""
    if item.demand is None:
        return Block.NOT_PLANNED
    if item.not_before is not None and situation.now < item.not_before:
        return Block.NOT_BEFORE
    if item.after and any(situation.ended.get(other) is not ItemState.DONE for other in item.after):
        return Block.AFTER
    return None


def quota_block(item: Item, standing: Standing, situation: Situation) -> Block | None:
    """Return the quota that its owner would exceed with an item run the narrowest way."""
    assert item.demand is not None
    user = situation.user(item.owner)
    if user.max_devices is not None and (
        standing.num_devices + item.demand.narrowest.width > user.max_devices
    ):
        return Block.DEVICE_QUOTA
    hours = user.device_hours_a_week
    if hours is not None and standing.week_s + device_s(item) > hours * HOUR_S:
        return Block.HOUR_QUOTA
    return None


def is_overdue(item: Item, now: float, max_wait_s: float) -> bool:
    """Whether an item has waited so long that nothing submitted later goes before it."""
    if now - item.queued_at < max_wait_s:  # as of nearly all: a decision asks this of thousands
        return False
    return item.not_before is None or now - item.not_before >= max_wait_s


def in_order(items: Iterable[Item], standing_of: dict[str, Standing], situation: Situation) -> Iterator[Item]:
    """Yield items in the order of the queue, counting each as used by its owner."""
    now, max_wait_s = situation.now, situation.policy.max_wait_s
    moved: list[Item] = []
    overdue: list[Item] = []
    by_priority: dict[int, dict[str, list[Item]]] = {}
    for item in items:
        if item.rank is not None:
            moved.append(item)
        elif is_overdue(item, now, max_wait_s):
            overdue.append(item)
        else:
            by_priority.setdefault(item.priority, {}).setdefault(item.owner, []).append(item)
    moved.sort(key=lambda item: (item.rank, item.id))
    overdue.sort(key=lambda item: item.id)
    for item in (*moved, *overdue):
        standing_of[item.owner].used_s += device_s(item)
        yield item
    for priority in sorted(by_priority, reverse=True):
        queues = by_priority[priority]
        for queue in queues.values():
            queue.sort(key=attrgetter("id"), reverse=True)
        heap = [(standing_of[owner].key, owner) for owner in queues]
        heapq.heapify(heap)
        while heap:
            _, owner = heapq.heappop(heap)
            item = queues[owner].pop()
            standing_of[owner].used_s += device_s(item)
            if queues[owner]:
                heapq.heappush(heap, (standing_of[owner].key, owner))
            yield item
