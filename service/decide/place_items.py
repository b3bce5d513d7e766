"""Which items start now, where, and who gives way to them.  Pure.

Devices are chosen by `scheduler.decide.placement`, as for the trials of a study: by memory, side by side
where that pays and both allow it, gangs all at once; the first item that has to wait reserves the devices on
which it will start soonest, and others overtake it only if they do not delay it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autosft.scheduler.decide.occupancy import Kind, Option
from autosft.scheduler.decide.placement import (
    MAX_BACKFILL,
    Filling,
    Placement,
    occupy,
    start_now,
    vacate,
)
from autosft.service.decide.shares import (
    Block,
    Standing,
    block_of,
    in_order,
    is_overdue,
    quota_block,
    standings,
)
from autosft.service.decide.situation import (
    Situation,
    occupied,
    predicted_ends,
    rate_of,
    request_for,
    way_index,
    way_of,
)
from autosft.service.values import Decision, Item, ItemState, Place, Start


def decide(situation: Situation) -> Decision:
    """Return what starts now and what has to give way.

    At most `Policy.max_starts` items start in one decision; then `is_whole` is false, and the next one may
    follow at once.  The result does not depend on the order of the inputs.
    """
    queue = Queue(situation)
    starts: list[Start] = []
    for item in queue.in_order():
        if len(starts) >= situation.policy.max_starts:
            return Decision(starts=tuple(starts), is_whole=False)
        if (start := queue.offer(item)) is not None:
            starts.append(start)
        elif queue.filling.is_over:
            break
    return Decision(starts=tuple(starts), preempts=_preempts(situation, queue))


class Queue:
    """The queue at one moment, as items are started from it."""

    def __init__(self, situation: Situation, *, max_behind: int = MAX_BACKFILL) -> None:
        self.situation = situation
        ends = predicted_ends(situation)
        self.kinds = occupied(situation, ends)
        self.devices = {device.uuid: device for device in situation.devices}
        self._max_behind = max_behind
        self.begin(situation.now, num_waiting=0)
        self.standings = standings(situation, ends)
        self.started: list[tuple[Option, Placement]] = []
        self.blocks: dict[int, Block] = {}
        self.ready: list[Item] = []
        for item in situation.items:
            if not item.is_queued:
                continue
            block = block_of(item, situation) or (
                None if can_ever_start(item, self.kinds) else Block.NO_DEVICE
            )
            if block is None:
                self.ready.append(item)
            else:
                self.blocks[item.id] = block
        self.num_left = len(self.ready)

    def begin(self, now: float, *, num_waiting: int) -> None:
        """Begin a pass over the queue, with no reservation."""
        self.now = now
        self.filling = Filling(self.kinds, now=now, max_behind=self._max_behind)
        self.num_left = num_waiting

    def in_order(self, later: Sequence[Item] = ()) -> Iterator[Item]:
        """Yield the items that may start, and `later` ones, in their order.

        The order counts them as used, quotas do not.
        """
        counted = {
            owner: Standing(share=standing.share, used_s=standing.used_s, week_s=standing.week_s)
            for owner, standing in self.standings.items()
        }
        return in_order([*self.ready, *later], counted, self.situation)

    def offer(self, item: Item) -> Start | None:
        """Start an item if there is room for it that is not kept for others."""
        num_left, self.num_left = self.num_left, self.num_left - 1
        standing = self.standings[item.owner]
        if (block := quota_block(item, standing, self.situation)) is not None:
            self.blocks[item.id] = block
            return None
        request = request_for(item, max_width=self._max_width(item, num_left, standing))
        found = self.filling.offer(request)
        if found is None:
            return None
        assert item.demand is not None
        self.started.append((request.options[found.option], found))
        position = way_index(item, request.options[found.option])
        way = item.demand.ways[position]
        rate = rate_of(item, way, self.devices, found.device_uuids)
        standing.num_devices += way.width
        standing.week_s += rate * max(0.0, found.ends_at - self.now)
        place = Place(way=position, device_uuids=found.device_uuids, bytes_each=way.bytes_each, rate=rate)
        return Start(item=item.id, place=place, ends_at=found.ends_at)

    def _max_width(self, item: Item, num_left: int, standing: Standing) -> int:
        """Return how many devices an item may have: more than it needs only if nobody else waits for them."""
        assert item.demand is not None
        num_free = sum(len(kind.empty) for kind in self.kinds.values())
        width = max(item.demand.narrowest.width, num_free // max(1, num_left))
        quota = self.situation.user(item.owner).max_devices
        return width if quota is None else min(width, quota - standing.num_devices)


def can_ever_start(item: Item, kinds: dict[str, Kind]) -> bool:
    """Whether the devices could run an item if nothing else ran on them."""
    assert item.demand is not None
    for way in item.demand.ways:
        kind = kinds.get(way.kind)
        if kind is not None and kind.could_take(way.width, way.bytes_each):
            return True
    return False


# Preemption


def _preempts(situation: Situation, queue: Queue) -> tuple[int, ...]:
    """Return the running items that give way to the first one that has to wait.

    Only items of a strictly lower priority do, and none that had waited for `max_wait_s` before it started:
    the lowest priority first, then the one that has run the shortest.  As few as make room.
    """
    first, reserved = queue.filling.first_waiting, queue.filling.reserved
    near = situation.now + situation.policy.preempt_after_s
    if first is None or reserved is None or reserved.starts_at <= near:
        return ()
    item = next(one for one in queue.ready if one.id == first.trial)
    lower = [one for one in situation.items if _may_give_way(one, item, situation)]
    lower.sort(key=lambda one: (one.priority, -(one.started_at or 0.0), -one.id))
    stopping = {one.id for one in situation.items if one.state is ItemState.STOPPING}

    if not lower:
        return ()
    kinds = occupied(situation, predicted_ends(situation), without=stopping)
    for option, placement in queue.started:  # they are there by then
        occupy(kinds, option, placement)
    found = start_now(first, kinds, now=situation.now)
    if found is not None:
        return ()  # those that are stopping make room
    asked = {option.kind for option in first.options}
    gone: list[Item] = []
    for one in lower:
        if found is None and (kind := way_of(one).kind) in asked and one.place is not None:
            vacate(kinds, kind, one.id, one.place.device_uuids)
            gone.append(one)
            found = start_now(first, kinds, now=situation.now)
    wanted = set() if found is None else set(found.device_uuids)
    return tuple(sorted(one.id for one in gone if one.place and wanted & {*one.place.device_uuids}))


def _may_give_way(running: Item, to: Item, situation: Situation) -> bool:
    if running.state is not ItemState.RUNNING or running.priority >= to.priority:
        return False
    started_at = running.started_at or situation.now
    return not is_overdue(running, started_at, situation.policy.max_wait_s)
