"""Devices and the trials on them, as a placement sees them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from autosft.profiles.hardware.device import DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A running trial's use of a device."""

    num_bytes: int
    load: float  # share of the device's time, see `sharing`
    ends_at: float  # predicted
    is_alone: bool = False  # the device is not shared: it is part of a gang, or the trial measures its memory


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """A device and the trials that are running on it."""

    device: DeviceProfile
    kind: str  # devices of one kind take the same plans and cost the same to share
    usable_bytes: int  # total available to trials
    max_trials: int  # that may share it
    overhead: float = 1.0  # cost of sharing it, see `sharing`
    residents: tuple[Resident, ...] = ()
    free_bytes: int = field(init=False)
    load: float = field(init=False)

    def __post_init__(self) -> None:  # cached, since a decision looks at hundreds of devices
        object.__setattr__(
            self, "free_bytes", self.usable_bytes - sum([resident.num_bytes for resident in self.residents])
        )
        object.__setattr__(self, "load", sum([resident.load for resident in self.residents]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
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

    def add(self, state: DeviceState) -> None:
        self.all.append(state)
        residents = state.residents
        if not residents:
            self.empty.append(state)
        elif len(residents) < state.max_trials and not residents[0].is_alone:
            (self.with_one if len(residents) == 1 else self.with_more).append(state)
        else:
            return
        self.most_free_bytes = max(self.most_free_bytes, state.free_bytes)

    def sort(self) -> None:
        self.empty.sort(key=lambda state: (state.usable_bytes, state.device.uuid))
        self.with_one.sort(key=lambda state: state.load)
        self.with_more.sort(key=lambda state: state.load)


def by_kind(devices: Iterable[DeviceState]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for state in sorted(devices, key=lambda state: state.device.uuid):
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
    large = by_node(state for state in kind.all if option.num_bytes <= state.usable_bytes)
    return any(len(states) >= option.num_devices for states in large.values())
