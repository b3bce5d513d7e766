"""Placement of trials on devices: a pure function of the queue and the free resources.

`place` returns the next trial to start and its devices; the caller starts it and calls again.  A trial has
one option for each kind of device that it fits, and for gangs of several.  Its bytes are upper bounds, so
that whatever is placed fits; several trials share a device if that pays (`scheduler.decide.sharing`).

Limits: a gang has its devices to itself, and they are of one kind.  Only the first trial that has to wait
gets a reservation (EASY backfilling: Lifka, "The ANL/IBM SP scheduling system", 1995), so later ones may be
passed more than once.  Reservations rest on predicted ends.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from autosft.profiles.hardware.device import DeviceProfile
from autosft.scheduler.decide.sharing import pays, slowdown

#: Number of waiting trials that are considered behind the first one that has to wait.
MAX_BACKFILL = 100
#: Number of trials for which a later start on a faster device is considered; further ones just wait.
MAX_LOOKS_AHEAD = 5


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A waiting trial."""

    trial: int
    options: tuple[Option, ...]
    priority: int = 0  # lowest first
    order: tuple[int, int, float, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", order(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The next trial to start: which of its options, on which devices, and its predicted end."""

    trial: int
    option: int  # position in its request's options
    device_uuids: tuple[str, ...]
    ends_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reservation:
    """The devices that the first waiting trial will get, and when."""

    device_uuids: frozenset[str]
    starts_at: float
    ends_at: float


def place(
    requests: Iterable[Request],
    devices: Iterable[DeviceState],
    *,
    now: float,
    work_ends_at: float = math.inf,
) -> Placement | None:
    """Choose the next trial to start and its devices; return None if all have to wait.

    Trials are considered in the order of `order`.  The first that cannot start reserves the devices on which
    it will start soonest.  Others may overtake it if that does not delay it: on other devices, or if they end
    before its start.  `work_ends_at` is when all work would end, spread evenly: a trial that would end later
    than that, on a slow device, waits for a faster one if it would end sooner there.  The result does not
    depend on the order of the inputs.
    """
    kinds = _by_kind(devices)
    reserved: _Reservation | None = None
    num_looks = 0
    for num_tested, request in enumerate(sorted(requests, key=attrgetter("order"))):
        if num_tested > MAX_BACKFILL:
            break
        found = _start_now(request, kinds, reserved, now)
        if found is not None and found.ends_at > work_ends_at and _has_faster(request, found.option):
            later = _reserve(request, kinds, now) if num_looks < MAX_LOOKS_AHEAD else None
            if num_looks >= MAX_LOOKS_AHEAD or (later is not None and later.ends_at < found.ends_at):
                found = None
            num_looks += 1
        if found is not None:
            return found
        if reserved is None:
            reserved = _reserve(request, kinds, now)
    return None


def _has_faster(request: Request, option: int) -> bool:
    return any(other.run_s < request.options[option].run_s for other in request.options)


def order(request: Request) -> tuple[int, int, float, int]:
    """Return the sort key of a trial: priority, then the widest gang, the longest run, the trial number.

    Starting wide and long trials first ends a study soonest, since narrow and short ones fill the gaps
    (longest processing time first: Graham 1969).
    """
    widest = min((option.num_devices for option in request.options), default=0)
    longest = min((option.run_s for option in request.options), default=0.0)
    return request.priority, -widest, -longest, request.trial


def cluster_s(options: Iterable[Option], num_by_kind: Mapping[str, int]) -> float:
    """Return the time that all devices together take for a trial, each kind at its own speed, in seconds.

    The `work_ends_at` of `place` is the sum over all trials, plus the rest of the running ones.  A trial that
    shares a device is assumed to use a share of it equal to its load.
    """
    rates: dict[str, float] = {}
    for option in options:
        device_s = max(
            1e-9, option.run_s * option.num_devices * (option.load if option.num_devices == 1 else 1.0)
        )
        rates[option.kind] = max(rates.get(option.kind, 0.0), num_by_kind.get(option.kind, 0) / device_s)
    return 1.0 / sum(rates.values()) if any(rates.values()) else 0.0


# Devices of one kind, indexed once per decision


class _Kind:
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


def _by_kind(devices: Iterable[DeviceState]) -> dict[str, _Kind]:
    kinds: dict[str, _Kind] = {}
    for state in sorted(devices, key=lambda state: state.device.uuid):
        kinds.setdefault(state.kind, _Kind()).add(state)
    for kind in kinds.values():
        kind.sort()
    return kinds


def _by_node(states: Iterable[DeviceState]) -> dict[str, list[DeviceState]]:
    nodes: dict[str, list[DeviceState]] = {}
    for state in states:
        nodes.setdefault(state.device.node, []).append(state)
    return nodes


# Starting now


def _start_now(
    request: Request, kinds: dict[str, _Kind], reserved: _Reservation | None, now: float
) -> Placement | None:
    """Return the placement that ends soonest; in a tie, the one with the fewest devices."""
    found = [
        Placement(trial=request.trial, option=position, device_uuids=uuids, ends_at=ends_at)
        for position, option in enumerate(request.options)
        if (kind := kinds.get(option.kind)) is not None
        for uuids, ends_at in _ways(option, kind, reserved, now)
    ]
    return min(
        found,
        key=lambda placement: (placement.ends_at, len(placement.device_uuids), placement.device_uuids),
        default=None,
    )


def _ways(
    option: Option, kind: _Kind, reserved: _Reservation | None, now: float
) -> Iterator[tuple[tuple[str, ...], float]]:
    if option.num_bytes > kind.most_free_bytes:
        return
    if option.num_devices == 1:
        single = _single(option, kind, reserved, now)
        if single is not None:
            yield single
        return
    ends_at = now + option.run_s
    held = frozenset() if reserved is None or ends_at <= reserved.starts_at else reserved.device_uuids
    gang = _gang(option, kind, [state for state in kind.empty if state.device.uuid not in held])
    if gang:
        yield tuple(state.device.uuid for state in gang), ends_at


def _single(
    option: Option, kind: _Kind, reserved: _Reservation | None, now: float
) -> tuple[tuple[str, ...], float] | None:
    """Choose a device: soonest end, then fewest trials on it, tightest fit, lowest UUID."""
    held = frozenset() if reserved is None else reserved.device_uuids
    until = math.inf if reserved is None else reserved.starts_at
    ends_at = now + option.run_s
    for state in kind.empty[bisect_left(kind.empty, option.num_bytes, key=attrgetter("usable_bytes")) :]:
        if ends_at <= until or state.device.uuid not in held:
            return (state.device.uuid,), ends_at  # no shared device is faster than an empty one
    if option.is_alone:
        return None
    best: tuple[float, int, int, str] | None = None
    for several in (kind.with_one, kind.with_more):
        for state in several:
            num = len(state.residents)
            if not pays(state.load, num, option.load, state.overhead):
                break
            if option.num_bytes > state.free_bytes:
                continue
            factor = slowdown(state.load + option.load, num + 1, state.overhead)
            rank = now + option.run_s * factor, num, state.free_bytes, state.device.uuid
            # A reserved device only takes trials that end before the reservation and do not slow others down.
            if state.device.uuid in held and (rank[0] > until or factor > 1.0):
                continue
            if best is None or rank < best:
                best = rank
    return None if best is None else ((best[3],), best[0])


def _gang(option: Option, kind: _Kind, free: Sequence[DeviceState]) -> list[DeviceState]:
    """Choose the devices of a gang; return none if it has to wait.

    If any node is large enough, the gang runs on one node: the one with the fastest slowest link, then with
    the fewest devices left over.  Otherwise it runs on as few nodes as possible.
    """
    number = option.num_devices
    if len(free) < number:
        return []
    free_by_node = _by_node(state for state in free if option.num_bytes <= state.usable_bytes)
    whole = [
        (-_link(chosen[-1]), len(states), [state.device.uuid for state in chosen], chosen)
        for states in free_by_node.values()
        if len(states) >= number
        for chosen in [sorted(states, key=_linked_first)[:number]]
    ]
    if whole:
        return min(whole, key=lambda choice: choice[:3])[3]
    if _fits_a_node(option, kind) or sum(map(len, free_by_node.values())) < number:
        return []
    nodes = sorted(free_by_node.items(), key=lambda node: (-len(node[1]), node[0]))
    return [state for _, states in nodes for state in sorted(states, key=_linked_first)][:number]


def _fits_a_node(option: Option, kind: _Kind) -> bool:
    """Whether any node has enough devices for a gang, including busy ones."""
    large = _by_node(state for state in kind.all if option.num_bytes <= state.usable_bytes)
    return any(len(states) >= option.num_devices for states in large.values())


def _linked_first(state: DeviceState) -> tuple[float, int, str]:
    return -_link(state), state.usable_bytes, state.device.uuid


def _link(state: DeviceState) -> float:
    return state.device.link_bytes_per_s or 0.0


# Reserving


def _reserve(request: Request, kinds: dict[str, _Kind], now: float) -> _Reservation | None:
    """Return where and when a trial will be able to start, for the option that then ends soonest."""
    found = [
        _Reservation(device_uuids=uuids, starts_at=starts_at, ends_at=starts_at + option.run_s)
        for option in request.options
        if option.kind in kinds
        for starts_at, uuids in _earliest(option, kinds[option.kind], now)
    ]
    return min(
        found,
        key=lambda reservation: (
            reservation.ends_at,
            len(reservation.device_uuids),
            sorted(reservation.device_uuids),
        ),
        default=None,
    )


def _earliest(option: Option, kind: _Kind, now: float) -> Iterator[tuple[float, frozenset[str]]]:
    """Yield the earliest start on a single device, or on a gang of devices."""
    large = [state for state in kind.all if option.num_bytes <= state.usable_bytes]
    if option.num_devices == 1:
        if large:
            starts_at, uuid = _first_to_open(option, large, now)
            yield starts_at, frozenset({uuid})
        return
    groups = list(_by_node(large).values()) if _fits_a_node(option, kind) else [large]
    gangs = [
        sorted((max([now, *(r.ends_at for r in state.residents)]), state.device.uuid) for state in group)[
            : option.num_devices
        ]
        for group in groups
        if len(group) >= option.num_devices
    ]
    if gangs:
        soonest = min(gangs, key=lambda gang: (gang[-1][0], gang))
        yield soonest[-1][0], frozenset(uuid for _, uuid in soonest)


def _first_to_open(option: Option, states: Iterable[DeviceState], now: float) -> tuple[float, str]:
    """Return when the first of the devices has room for a trial, and its UUID (the lowest in a tie).

    Most devices can be skipped: none has room before the first of its trials ends.
    """
    full = []
    open_now = []
    for state in states:
        if _has_room(option, state, state.residents, state.free_bytes, state.load):
            open_now.append(state.device.uuid)
        else:  # not before one of its trials ends
            full.append((max(now, min([r.ends_at for r in state.residents])), state.device.uuid, state))
    if open_now:
        return now, min(open_now)
    found = (math.inf, "")
    for not_before, uuid, state in sorted(full, key=lambda entry: entry[:2]):
        if not_before > found[0]:
            break
        found = min(found, (_opens_at(option, state, now), uuid))
    return found


def _has_room(
    option: Option, state: DeviceState, there: Sequence[Resident], free_bytes: int, load: float
) -> bool:
    """Whether a trial fits on a device next to `there`, and sharing pays."""
    if (
        len(there) >= state.max_trials
        or (there and (there[0].is_alone or option.is_alone))
        or option.num_bytes > free_bytes
    ):
        return False
    return pays(load, len(there), option.load, state.overhead)


def _opens_at(option: Option, state: DeviceState, now: float) -> float:
    """Return when a single-device trial will fit on this one, as others end in their predicted order."""
    left = sorted(state.residents, key=lambda resident: resident.ends_at)
    starts_at = now
    while left:
        free_bytes = state.usable_bytes - sum(resident.num_bytes for resident in left)
        if _has_room(option, state, left, free_bytes, sum(resident.load for resident in left)):
            break
        starts_at = max(now, left.pop(0).ends_at)
    return starts_at
