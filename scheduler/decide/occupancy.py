"""Devices and the trials on them, as a placement sees them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import zip_longest
from operator import attrgetter
from typing import NamedTuple, Protocol


class Located(Protocol):
    """What a placement asks of a device."""

    @property
    def uuid(self) -> str: ...
    @property
    def node(self) -> str: ...
    @property
    def link_bytes_per_s(self) -> float | None: ...


# Named tuples: a decision makes hundreds of each, at a quarter of the time of a frozen dataclass.


class Resident(NamedTuple):
    """A running trial's use of a device."""

    num_bytes: int
    load: float  # share of the device's time, see `sharing`
    ends_at: float  # predicted
    is_alone: bool = False  # the device is not shared: it is part of a gang, or the trial measures its memory
    trial: int = -1  # its number, where that is of use


class DeviceState(NamedTuple):
    """A device and the trials that are running on it; made by `device_state`."""

    device: Located
    kind: str  # devices of one kind take the same plans and cost the same to share
    usable_bytes: int  # total available to trials
    max_trials: int  # that may share it
    overhead: float  # cost of sharing it, see `sharing`
    residents: tuple[Resident, ...]
    free_bytes: int
    load: float

    def with_residents(self, residents: tuple[Resident, ...]) -> DeviceState:
        """Return the same device with other trials on it."""
        return device_state(
            device=self.device,
            kind=self.kind,
            usable_bytes=self.usable_bytes,
            max_trials=self.max_trials,
            overhead=self.overhead,
            residents=residents,
        )


def device_state(
    *,
    device: Located,
    kind: str,
    usable_bytes: int,
    max_trials: int,
    overhead: float = 1.0,
    residents: tuple[Resident, ...] = (),
) -> DeviceState:
    """Return a device with what its trials leave of its memory and time."""
    free_bytes, load = usable_bytes, 0.0
    for resident in residents:
        free_bytes -= resident.num_bytes
        load += resident.load
    return DeviceState(device, kind, usable_bytes, max_trials, overhead, residents, free_bytes, load)


class Option(NamedTuple):
    """One way to run a trial."""

    kind: str
    num_devices: int
    num_bytes: int  # upper bound on each device, including the context
    load: float
    run_s: float  # predicted, without sharing
    is_alone: bool = False  # does not share its device


class Kind:
    """The devices of one kind: all of them, the empty ones, and those that may take another trial."""

    def __init__(self) -> None:
        self.all: list[DeviceState] = []
        self.empty: list[DeviceState] = []
        # Sorted by load, so that a search can stop at the first device on which another trial does not pay;
        # in two lists, since it pays differently next to one trial and next to several.
        self.with_one: list[DeviceState] = []
        self.with_more: list[DeviceState] = []
        self.most_free_bytes = 0
        self._positions: dict[str, int] = {}
        self._node_bytes: list[int] | None = None
        self._all_bytes: list[int] | None = None

    def add(self, state: DeviceState) -> None:
        self._positions[state.device.uuid] = len(self.all)
        self.all.append(state)
        if (there := self._list_of(state)) is not None:
            there.append(state)
            self.most_free_bytes = max(self.most_free_bytes, state.free_bytes)

    def sort(self) -> None:
        for states in (self.empty, self.with_one, self.with_more):
            states.sort(key=self._key)

    def change(self, uuid: str, residents: tuple[Resident, ...]) -> None:
        """Replace the trials on a device."""
        before = self.all[self._positions[uuid]]
        after = before.with_residents(residents)
        self.all[self._positions[uuid]] = after
        if (there := self._list_of(before)) is not None:
            at = bisect_left(there, self._key(before), key=self._key)
            assert there[at] is before
            del there[at]
        if (there := self._list_of(after)) is not None:
            there.insert(bisect_left(there, self._key(after), key=self._key), after)
            self.most_free_bytes = max(self.most_free_bytes, after.free_bytes)
        if before.free_bytes == self.most_free_bytes != after.free_bytes:
            several = (self.empty, self.with_one, self.with_more)
            self.most_free_bytes = max((s.free_bytes for states in several for s in states), default=0)

    def state(self, uuid: str) -> DeviceState:
        return self.all[self._positions[uuid]]

    def largest_gang(self, num_bytes: int) -> int:
        """Return how many devices of one node, busy ones included, could ever take so many bytes each."""
        if self._node_bytes is None:  # what a gang of 1, 2, ... devices can have on the best node for it
            nodes = [
                sorted((s.usable_bytes for s in states), reverse=True)
                for states in by_node(self.all).values()
            ]
            self._node_bytes = [max(with_so_many) for with_so_many in zip_longest(*nodes, fillvalue=0)]
        return _num_at_least(self._node_bytes, num_bytes)

    def could_take(self, num_devices: int, num_bytes: int) -> bool:
        """Whether so many devices, busy ones included, could ever take so many bytes each."""
        if self._all_bytes is None:
            self._all_bytes = sorted((state.usable_bytes for state in self.all), reverse=True)
        return num_devices <= len(self._all_bytes) and num_bytes <= self._all_bytes[num_devices - 1]

    def _list_of(self, state: DeviceState) -> list[DeviceState] | None:
        """Return the list that a device belongs to; None for one that takes no other trial."""
        if not state.residents:
            return self.empty
        if len(state.residents) < state.max_trials and not state.residents[0].is_alone:
            return self.with_one if len(state.residents) == 1 else self.with_more
        return None

    @staticmethod
    def _key(state: DeviceState) -> tuple[float, str]:
        """Return what a device's list is sorted by: bytes of an empty one, the load of others."""
        return (state.load if state.residents else state.usable_bytes), state.device.uuid


def _num_at_least(descending: list[int], num_bytes: int) -> int:
    return bisect_right(descending, -num_bytes, key=lambda usable_bytes: -usable_bytes)


def by_kind(devices: Iterable[DeviceState]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for state in sorted(devices, key=attrgetter("device.uuid")):
        kinds.setdefault(state.kind, Kind()).add(state)
    for kind in kinds.values():
        kind.sort()
    return kinds


def by_node(states: Iterable[DeviceState]) -> dict[str, list[DeviceState]]:
    nodes: dict[str, list[DeviceState]] = {}
    for state in states:
        nodes.setdefault(state.device.node, []).append(state)
    return nodes


def fits_a_node(option: Option, kind: Kind) -> bool:
    """Whether any node has enough devices for a gang, including busy ones."""
    return kind.largest_gang(option.num_bytes) >= option.num_devices
