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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

from autosft.scheduler.decide.occupancy import (
    DeviceState,
    Kind,
    Option,
    Resident,
    by_kind,
    by_node,
    fits_a_node,
)
from autosft.scheduler.decide.reservation import Reservation, reserve
from autosft.scheduler.decide.sharing import pays, slowdown

#: Number of waiting trials that are considered behind the first one that has to wait.
MAX_BACKFILL = 100
#: Number of trials for which a later start on a faster device is considered; further ones just wait.
MAX_LOOKS_AHEAD = 5


@dataclass(frozen=True, kw_only=True)  # without slots, for what is cached
class Request:
    """A waiting trial."""

    trial: int
    options: tuple[Option, ...]
    priority: int = 0  # lowest first

    @cached_property
    def order(self) -> tuple[int, int, float, int]:
        """What a study's trials are sorted by; a queue has an order of its own."""
        return order(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The next trial to start: which of its options, on which devices, and its predicted end."""

    trial: int
    option: int  # position in its request's options
    device_uuids: tuple[str, ...]
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
    kinds = by_kind(devices)
    reserved: Reservation | None = None
    num_looks = 0
    for num_tested, request in enumerate(sorted(requests, key=attrgetter("order"))):
        if num_tested > MAX_BACKFILL:
            break
        found = _start_now(request, kinds, reserved, now)
        if found is not None and found.ends_at > work_ends_at and _has_faster(request, found.option):
            later = reserve(request.options, kinds, now) if num_looks < MAX_LOOKS_AHEAD else None
            if num_looks >= MAX_LOOKS_AHEAD or (later is not None and later.ends_at < found.ends_at):
                found = None
            num_looks += 1
        if found is not None:
            return found
        if reserved is None:
            reserved = reserve(request.options, kinds, now)
    return None


def start_now(request: Request, kinds: dict[str, Kind], *, now: float) -> Placement | None:
    """Return where a trial could start now if nothing were kept for others, None if nowhere."""
    return _start_now(request, kinds, None, now)


class Filling:
    """Trials that are offered one after the other, in the order of a queue: each starts if it can.

    As `place` called again and again, at the cost of one pass: the first trial that cannot start reserves
    devices, and up to `max_behind` behind it are tried.  What starts is added to `kinds`, from which nothing
    may be taken before the last offer.
    """

    def __init__(self, kinds: dict[str, Kind], *, now: float, max_behind: int = MAX_BACKFILL) -> None:
        self.kinds = kinds
        self.now = now
        self.first_waiting: Request | None = None  # of those that can ever start
        self.reserved: Reservation | None = None  # for it
        self._left = max_behind
        self._in_vain = InVain()

    @property
    def is_over(self) -> bool:
        """Whether nobody further behind is tried."""
        return self._left < 0

    def offer(self, request: Request) -> Placement | None:
        """Start a trial if it delays nobody before it; return where, None if it has to wait."""
        if self.is_over:
            return None
        found = _start_now(request, self.kinds, self.reserved, self.now, self._in_vain)
        if found is not None:
            occupy(self.kinds, request.options[found.option], found)
            return found
        self._left -= 1
        if self.reserved is None:
            self.reserved = reserve(request.options, self.kinds, self.now)
            if self.reserved is not None:
                self.first_waiting = request
        return None


def vacate(kinds: dict[str, Kind], kind: str, trial: int, device_uuids: Iterable[str]) -> None:
    """Take a trial from its devices."""
    for uuid in device_uuids:
        there = kinds[kind].state(uuid).residents
        kinds[kind].change(uuid, tuple(resident for resident in there if resident.trial != trial))


def occupy(kinds: dict[str, Kind], option: Option, placement: Placement) -> None:
    """Put a trial on its devices."""
    resident = Resident(
        num_bytes=option.num_bytes,
        load=option.load,
        ends_at=placement.ends_at,
        is_alone=option.is_alone or option.num_devices > 1,
        trial=placement.trial,
    )
    kind = kinds[option.kind]
    for uuid in placement.device_uuids:
        kind.change(uuid, (*kind.state(uuid).residents, resident))


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


# Starting now


class InVain:
    """Options that have found no room while devices only fill: what needs no less finds none either.

    More bytes and a longer run have no more devices to choose from.  Nor has more load: a device on which it
    pays also pays with less (`sharing.pays`), nor does it pay on one because others have joined.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int, bool, bool], list[tuple[int, float, float]]] = {}

    def covers(self, option: Option, kind: Kind) -> bool:
        """Whether an option is known to find no room."""
        num_bytes, load, run_s = option.num_bytes, option.load, option.run_s
        for bytes_, load_, run_s_ in self._seen.get(self._key(option, kind), ()):
            if bytes_ <= num_bytes and load_ <= load and run_s_ <= run_s:
                return True
        return False

    def add(self, option: Option, kind: Kind) -> None:
        """Record that an option has found no room."""
        needs = option.num_bytes, option.load, option.run_s
        self._seen.setdefault(self._key(option, kind), []).append(needs)

    @staticmethod
    def _key(option: Option, kind: Kind) -> tuple[str, int, bool, bool]:
        """Return what has to be equal: a gang too large for any node may go over several, unlike others."""
        is_gang = option.num_devices > 1
        return option.kind, option.num_devices, option.is_alone, is_gang and fits_a_node(option, kind)


def _start_now(
    request: Request,
    kinds: dict[str, Kind],
    reserved: Reservation | None,
    now: float,
    in_vain: InVain | None = None,
) -> Placement | None:
    """Return the placement that ends soonest; in a tie, the one with the fewest devices."""
    found: list[Placement] = []
    for position, option in enumerate(request.options):
        kind = kinds.get(option.kind)
        if kind is None or (in_vain is not None and in_vain.covers(option, kind)):
            continue
        way = _way(option, kind, reserved, now)
        if way is not None:
            uuids, ends_at = way
            found.append(Placement(trial=request.trial, option=position, device_uuids=uuids, ends_at=ends_at))
        elif in_vain is not None:
            in_vain.add(option, kind)
    return min(
        found,
        key=lambda placement: (placement.ends_at, len(placement.device_uuids), placement.device_uuids),
        default=None,
    )


def _way(
    option: Option, kind: Kind, reserved: Reservation | None, now: float
) -> tuple[tuple[str, ...], float] | None:
    if option.num_bytes > kind.most_free_bytes:
        return None
    if option.num_devices == 1:
        return _single(option, kind, reserved, now)
    ends_at = now + option.run_s
    held = frozenset() if reserved is None or ends_at <= reserved.starts_at else reserved.device_uuids
    gang = _gang(option, kind, [state for state in kind.empty if state.device.uuid not in held])
    return (tuple(state.device.uuid for state in gang), ends_at) if gang else None


def _single(
    option: Option, kind: Kind, reserved: Reservation | None, now: float
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
            if option.num_bytes > state.free_bytes:
                continue
            num = len(state.residents)
            if not pays(state.load, num, option.load, state.overhead):
                break  # nor on those that are busier
            factor = slowdown(state.load + option.load, num + 1, state.overhead)
            rank = now + option.run_s * factor, num, state.free_bytes, state.device.uuid
            # A reserved device only takes trials that end before the reservation and do not slow others down.
            if state.device.uuid in held and (rank[0] > until or factor > 1.0):
                continue
            if best is None or rank < best:
                best = rank
    return None if best is None else ((best[3],), best[0])


def _gang(option: Option, kind: Kind, free: Sequence[DeviceState]) -> list[DeviceState]:
    """Choose the devices of a gang; return none if it has to wait.

    If any node is large enough, the gang runs on one node: the one with the fastest slowest link, then with
    the fewest devices left over.  Otherwise it runs on as few nodes as possible.
    """
    number = option.num_devices
    if len(free) < number:
        return []
    free_by_node = by_node(state for state in free if option.num_bytes <= state.usable_bytes)
    whole = [
        (-_link(chosen[-1]), len(states), [state.device.uuid for state in chosen], chosen)
        for states in free_by_node.values()
        if len(states) >= number
        for chosen in [sorted(states, key=_linked_first)[:number]]
    ]
    if whole:
        return min(whole, key=lambda choice: choice[:3])[3]
    if fits_a_node(option, kind) or sum(map(len, free_by_node.values())) < number:
        return []
    nodes = sorted(free_by_node.items(), key=lambda node: (-len(node[1]), node[0]))
    return [state for _, states in nodes for state in sorted(states, key=_linked_first)][:number]


def _linked_first(state: DeviceState) -> tuple[float, int, str]:
    return -_link(state), state.usable_bytes, state.device.uuid


def _link(state: DeviceState) -> float:
    return state.device.link_bytes_per_s or 0.0
