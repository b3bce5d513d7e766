"""Where trials run: a plain function over what waits and what is free.

`place` returns the next trial to start and its devices; the caller acts and asks again.  A trial brings one
way to run for each kind of device that it fits, and for gangs of several.  Its bytes are upper bounds, so
that what is placed fits; several trials share a device where that pays (`scheduler.sharing`).

Limits: a gang has its devices for itself, and is of one kind of device.  Of the trials that have to wait only
the first has a reservation (EASY backfilling: Lifka, "The ANL/IBM SP scheduling system", 1995), so that a
later one of them may be passed more than once.  Reservations rest on predicted ends.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from autosft.profiles.hardware.device import DeviceProfile
from autosft.scheduler.decide.sharing import pays, slowdown

#: So many waiting trials are tried behind one that has to wait.
MAX_BACKFILL = 100
#: For so many trials is a faster device looked for in the future; the others of the last ones wait.
MAX_LOOKS_AHEAD = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A running trial's hold on a device."""

    num_bytes: int
    load: float  # share of the device's time, see `sharing`
    ends_at: float  # predicted
    is_alone: bool = False  # nobody may join it: one of a gang, or it measures its own memory


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """A device and who is on it right now."""

    device: DeviceProfile
    kind: str  # devices of one kind take the same plans and cost the same to share
    usable_bytes: int  # that trials may take in all
    max_trials: int  # that share it
    overhead: float = 1.0  # what sharing it costs, see `sharing`
    residents: tuple[Resident, ...] = ()
    free_bytes: int = field(init=False)
    load: float = field(init=False)

    def __post_init__(self) -> None:  # once, since a decision looks at hundreds of devices
        object.__setattr__(
            self, "free_bytes", self.usable_bytes - sum([resident.num_bytes for resident in self.residents])
        )
        object.__setattr__(self, "load", sum([resident.load for resident in self.residents]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to run a trial."""

    kind: str
    num_devices: int
    num_bytes: int  # upper bound on each device, context included
    load: float
    run_s: float  # predicted, with its devices to itself
    is_alone: bool = False  # it shares its device with nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A trial that waits."""

    trial: int
    options: tuple[Option, ...]
    priority: int = 0  # the lowest first
    order: tuple[int, int, float, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", order(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The next trial to start: with which of its options, where, and until when as predicted."""

    trial: int
    option: int  # position in its request's options
    device_uuids: tuple[str, ...]
    ends_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reservation:
    """Devices that the first waiting trial will get, and when."""

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
    """Choose the next trial to start and its devices, or None when all have to wait.

    Trials come in the order of `order`.  The first that cannot start reserves the devices on which it will
    start soonest; others may pass it where they do not delay that: on other devices, or if they end before.
    `work_ends_at` is when all the work there is would end, spread evenly: a trial that would end later, on a
    slow device, waits for a faster one if it ends sooner there.  Equal inputs in any order give equal
    answers.
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
    """Return what trials are ordered by: priority, then the widest gang, the longest run, the number.

    Long and wide ones first end a study soonest, since short and narrow ones fill the gaps (longest
    processing time first: Graham 1969).
    """
    widest = min((option.num_devices for option in request.options), default=0)
    longest = min((option.run_s for option in request.options), default=0.0)
    return request.priority, -widest, -longest, request.trial


def cluster_s(options: Iterable[Option], num_by_kind: Mapping[str, int]) -> float:
    """Return how long all devices together take over a trial, each working on such ones at its own speed.

    What `place` wants to know as `work_ends_at` is the sum of this over all trials, and what is left of the
    running ones.  A trial that shares a device is taken to need its load of it.
    """
    rates: dict[str, float] = {}
    for option in options:
        device_s = max(
            1e-9, option.run_s * option.num_devices * (option.load if option.num_devices == 1 else 1.0)
        )
        rates[option.kind] = max(rates.get(option.kind, 0.0), num_by_kind.get(option.kind, 0) / device_s)
    return 1.0 / sum(rates.values()) if any(rates.values()) else 0.0


# A kind of device, looked at once for a whole decision


class _Kind:
    """The devices of one kind: all by UUID, those that nobody is on, those that may take one more."""

    def __init__(self) -> None:
        self.all: list[DeviceState] = []
        self.empty: list[DeviceState] = []
        # By load, so that a search ends with the first on which another trial does not pay; apart, since a
        # second trial makes all the difference.
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
    """Return the placement that ends soonest, of equal ones that with the fewest devices."""
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
    """Choose a device: the soonest end, then the fewest on it, the tightest fit, the lowest UUID."""
    held = frozenset() if reserved is None else reserved.device_uuids
    until = math.inf if reserved is None else reserved.starts_at
    ends_at = now + option.run_s
    for state in kind.empty[bisect_left(kind.empty, option.num_bytes, key=attrgetter("usable_bytes")) :]:
        if ends_at <= until or state.device.uuid not in held:
            return (state.device.uuid,), ends_at  # nothing is sooner than alone
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
            # A reserved device takes what neither outlasts nor slows down those on it.
            if state.device.uuid in held and (rank[0] > until or factor > 1.0):
                continue
            if best is None or rank < best:
                best = rank
    return None if best is None else ((best[3],), best[0])


def _gang(option: Option, kind: _Kind, free: Sequence[DeviceState]) -> list[DeviceState]:
    """Choose the devices of a gang, none where it has to wait.

    On one node where any node is large enough for it: the one with the fastest slowest link, then with the
    fewest devices left over.  Where none is, over as few nodes as possible.
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
    """Tell whether any node has enough devices for a gang, busy ones included."""
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
    """Yield the earliest start on one device, or on a gang of them."""
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
    """Return when the first of some devices has room for a trial, and the lowest UUID of these.

    Most devices need no closer look: nobody has left before the first of those that are there.
    """
    full = []
    open_now = []
    for state in states:
        if _has_room(option, state, state.residents, state.free_bytes, state.load):
            open_now.append(state.device.uuid)
        else:  # not before somebody leaves
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
    """Tell whether a trial fits on a device beside those who are there, and pays."""
    if (
        len(there) >= state.max_trials
        or (there and (there[0].is_alone or option.is_alone))
        or option.num_bytes > free_bytes
    ):
        return False
    return pays(load, len(there), option.load, state.overhead)


def _opens_at(option: Option, state: DeviceState, now: float) -> float:
    """Return when a trial of one device will fit on this one, as others leave it in their predicted order."""
    left = sorted(state.residents, key=lambda resident: resident.ends_at)
    starts_at = now
    while left:
        free_bytes = state.usable_bytes - sum(resident.num_bytes for resident in left)
        if _has_room(option, state, left, free_bytes, sum(resident.load for resident in left)):
            break
        starts_at = max(now, left.pop(0).ends_at)
    return starts_at
