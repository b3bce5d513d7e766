"""When a trial that has to wait will be able to start, as running ones end as predicted.  Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from autosft.scheduler.decide.occupancy import DeviceState, Kind, Option, Resident, by_node, fits_a_node
from autosft.scheduler.decide.sharing import pays


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """The devices that the first waiting trial will get, and when."""

    device_uuids: frozenset[str]
    starts_at: float
    ends_at: float


def reserve(options: Iterable[Option], kinds: dict[str, Kind], now: float) -> Reservation | None:
    """Return where and when a trial will be able to start, for the option that then ends soonest."""
    found = [
        Reservation(device_uuids=uuids, starts_at=starts_at, ends_at=starts_at + option.run_s)
        for option in options
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


def _earliest(option: Option, kind: Kind, now: float) -> Iterator[tuple[float, frozenset[str]]]:
    """Yield the earliest start on a single device, or on a gang of devices."""
    large = [state for state in kind.all if option.num_bytes <= state.usable_bytes]
    if option.num_devices == 1:
        if large:
            starts_at, uuid = _first_to_open(option, large, now)
            yield starts_at, frozenset({uuid})
        return
    groups = list(by_node(large).values()) if fits_a_node(option, kind) else [large]
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
