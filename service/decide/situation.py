"""What a decision looks at: the open items, the devices, the users and what they have used."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from autosft.scheduler.decide.occupancy import Kind, Option, Resident, by_kind, device_state
from autosft.scheduler.decide.placement import Request
from autosft.service.values import Device, Item, ItemState, Usage, User, Way

HOUR_S = 3600.0
#: An item that runs longer than predicted is expected to go on for this share of what it has taken.
OVERRUN = 0.1
MIN_OVERRUN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How the queue is ordered."""

    half_life_s: float = 24 * HOUR_S  # after which what was used counts half
    max_wait_s: float = 24 * HOUR_S  # after which an item goes before all that were submitted later
    preempt_after_s: float = 300.0  # a reservation that is nearer is waited for: stopping others takes time
    stop_s: float = 120.0  # that a driver takes to save its checkpoints and end
    max_starts: int = 8  # in one decision; the next one follows at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything that a decision depends on."""

    now: float
    items: tuple[Item, ...]  # all that are open
    devices: tuple[Device, ...]
    users: Mapping[str, User] = field(default_factory=dict)  # those without a row have the defaults
    usage: Mapping[str, Usage] = field(default_factory=dict)
    ended: Mapping[int, ItemState] = field(default_factory=dict)  # of items that others wait for
    policy: Policy = field(default_factory=Policy)

    def user(self, name: str) -> User:
        return self.users.get(name) or unknown_user(name)


@functools.lru_cache(maxsize=256)
def unknown_user(name: str) -> User:
    """Return somebody without a row, whom a decision asks for again and again."""
    return User(name=name)


def way_of(item: Item) -> Way:
    """Return how a placed item runs."""
    assert item.demand is not None
    assert item.place is not None
    return item.demand.ways[item.place.way]


def remaining_s(item: Item, way: Way) -> float:
    """Return the predicted seconds that are left of an item."""
    return way.seconds * max(0.0, 1.0 - item.progress)


def predicted_end(item: Item, situation: Situation) -> float:
    """Return when a placed item will end: as its driver predicts, else as it was predicted before."""
    now = situation.now
    if item.state is ItemState.STOPPING:
        return now + situation.policy.stop_s
    started_at = now if item.started_at is None else item.started_at
    ends_at = item.ends_at
    if ends_at is None:
        ends_at = started_at + remaining_s(item, way_of(item))
    return max(ends_at, now + max(MIN_OVERRUN_S, OVERRUN * (now - started_at))) if ends_at < now else ends_at


def predicted_ends(situation: Situation) -> dict[int, float]:
    """Return when each placed item will end, by its id."""
    return {item.id: predicted_end(item, situation) for item in situation.items if item.is_placed}


def occupied(
    situation: Situation, ends: Mapping[int, float], *, without: Collection[int] = ()
) -> dict[str, Kind]:
    """Return the devices with the items that are placed on them, except some; `ends` are predicted."""
    residents: dict[str, list[Resident]] = {}
    for item in situation.items:
        place = item.place
        if place is None or item.id not in ends or item.id in without:
            continue
        way = way_of(item)
        is_alone = way.width > 1 or not shares(item, way)
        there = Resident(place.bytes_each, way.load, ends[item.id], is_alone, item.id)
        for uuid in place.device_uuids:
            if uuid in residents:
                residents[uuid].append(there)
            else:
                residents[uuid] = [there]
    return by_kind(
        device_state(
            device=device,
            kind=device.kind,
            usable_bytes=device.usable_bytes,
            max_trials=device.max_items,
            overhead=device.overhead,
            residents=tuple(residents.get(device.uuid, ())),
        )
        for device in situation.devices
    )


def shares(item: Item, way: Way) -> bool:
    """Whether an item may run beside others."""
    return item.may_share and way.may_share


def request_for(item: Item, *, max_width: int) -> Request:
    """Return an item as a placement sees it, with the ways that need at most so many devices."""
    assert item.demand is not None
    options = tuple(
        [
            Option(
                way.kind,
                way.width,
                way.bytes_each,
                way.load,
                remaining_s(item, way),
                not shares(item, way),
            )
            for way in item.demand.ways
            if way.width <= max_width
        ]
    )
    return Request(trial=item.id, options=options)


def way_index(item: Item, option: Option) -> int:
    """Return the position in its demand of the way that an option stands for."""
    assert item.demand is not None
    for position, way in enumerate(item.demand.ways):
        if (way.kind, way.width, way.bytes_each) == (option.kind, option.num_devices, option.num_bytes):
            return position
    raise AssertionError(option)


def rate_of(item: Item, way: Way, devices: Mapping[str, Device], device_uuids: Collection[str]) -> float:
    """Return the device-seconds that an item is charged for each second.

    A whole device for each that it has to itself; of a shared one, its larger share of time and memory.
    """
    if way.width > 1 or not shares(item, way):
        return float(way.width)
    [uuid] = device_uuids
    return min(1.0, max(way.load, way.bytes_each / max(1, devices[uuid].usable_bytes)))
