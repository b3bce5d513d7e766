"""Which devices a study uses, with which method, and how many trials share each of them.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.memory_ways import AUTO, EXACT, MemoryWay, ways_of
from autosft.profiles.recipe import Method
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.numerics import can_hold, can_take_part
from autosft.scheduler.decide.self_measuring import Measuring
from autosft.scheduler.decide.sharing import (
    assumed_overhead,
    at_most_at_once,
    best_number,
    threads_each,
    trials_on_cores,
)
from autosft.scheduler.study_run import Slots, planning_class
from autosft.studies.request import TuneRequest
from autosft.studies.trial import ExecutionPlan, PinnedSettings

T = TypeVar("T")

#: A plan of the default configuration within so many bytes of a device; None if it does not fit.
PlanWithin = Callable[[DeviceProfile, int], ExecutionPlan | None]

#: Gang sizes to try if one device is too small for the default configuration.
GANG_SIZES = (2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceChoice:
    """A method and devices that a study could use."""

    method: Method
    devices: tuple[DeviceProfile, ...]  # the one with the least memory first
    devices_per_trial: int = 1
    way: MemoryWay = EXACT  # of holding what is trained
    measuring: Measuring = Measuring.LIKELY  # whether trials may measure their own memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Participants(Generic[T]):
    """The method and devices of a study, and its basis."""

    method: Method
    devices: tuple[DeviceProfile, ...]  # the one with the least memory first
    left_out: tuple[DeviceProfile, ...]  # too small for the default configuration
    devices_per_trial: int
    way: MemoryWay  # of holding what is trained
    basis: T


def choose_participants(
    request: TuneRequest, devices: Sequence[DeviceProfile], basis_on: Callable[[DeviceChoice], T]
) -> Participants[T]:
    """Return the first choice of method and devices that the default configuration fits.

    `basis_on` returns the basis of a choice; it raises DoesNotFitError if the default configuration does not
    fit the smallest of its devices.  If no choice fits, the error for the largest device is raised.
    """
    ascending = sorted(devices, key=lambda device: (usable_bytes(device), device.uuid))
    refused: planner.DoesNotFitError | None = None
    for choice in choices(request, ascending):
        try:
            basis = basis_on(choice)
        except planner.DoesNotFitError as error:
            if choice.devices_per_trial == 1 and choice.measuring is Measuring.LIKELY:
                refused = error
            continue
        return Participants(
            method=choice.method,
            devices=choice.devices,
            left_out=tuple(device for device in ascending if device not in choice.devices),
            devices_per_trial=choice.devices_per_trial,
            way=choice.way,
            basis=basis,
        )
    assert refused is not None, "there is at least one device"
    raise refused


def choices(request: TuneRequest, ascending: Sequence[DeviceProfile]) -> Iterator[DeviceChoice]:
    """Yield methods and devices in order of preference; `ascending` is sorted by memory.

    The method is the requested one; for auto, full fine-tuning if that fits any device, else LoRA; if neither
    does, the first of them that fits several devices together.  `--memory lean` is full fine-tuning held that
    way; with `--memory auto`, lean ways are tried where exact does not fit.  All devices that the default
    configuration fits take part.  If nothing bounds its memory, those that it is guessed to fit; if there are
    none, the last method is tried on the largest device.
    """
    ways = methods_and_ways(request)
    for method, way in ways:
        for several in without_the_smallest(ascending):
            if way is EXACT or all(can_hold(way, device) for device in several):
                yield DeviceChoice(method=method, devices=tuple(several), way=way)
    for method, way in ways:
        for alike, size in gangs(ascending, request.max_gpus_per_trial):
            if way is EXACT or can_hold(way, alike[0]):
                yield DeviceChoice(method=method, devices=tuple(alike), devices_per_trial=size, way=way)
    method, way = ways[-1]
    yield DeviceChoice(method=method, devices=tuple(ascending[-1:]), way=way, measuring=Measuring.ANYWAY)


def methods_and_ways(request: TuneRequest) -> list[tuple[Method, MemoryWay]]:
    """Return the methods of a request with the ways to hold what they train, in order of preference."""
    trains_all = Method.FULL if request.method == "auto" else Method(request.method)
    ways = [(trains_all, way) for way in ways_of(request.memory)]
    has_lora = request.method == "auto" and request.memory in (EXACT.name, AUTO)
    return [*ways, (Method.LORA, EXACT)] if has_lora else ways


def without_the_smallest(ascending: Sequence[DeviceProfile]) -> Iterator[Sequence[DeviceProfile]]:
    """Yield all devices, then those above the smallest memory, and so on."""
    for position, device in enumerate(ascending):
        before = ascending[position - 1] if position else None
        if before is None or (before.name, usable_bytes(before)) != (device.name, usable_bytes(device)):
            yield ascending[position:]


def gangs(
    ascending: Sequence[DeviceProfile], at_most: int | None
) -> Iterator[tuple[Sequence[DeviceProfile], int]]:
    """Yield (identical devices, number of them per trial): largest devices and smallest gangs first."""
    for name in dict.fromkeys(device.name for device in reversed(ascending) if not device.is_mig):
        alike = [device for device in ascending if device.name == name]
        for size in GANG_SIZES:
            if size <= min(len(alike), at_most or len(alike)):
                yield alike, size


# Sharing


def sharing_policy(
    request: TuneRequest,
    participants: Participants[Any],
    *,
    pinned: PinnedSettings,
    plan_within: PlanWithin,
    is_mps_on: bool,
) -> Callable[[DeviceProfile], Slots | None]:
    """Return the function that decides how a device is shared, at the start or when it joins later.

    It returns None for a device that does not compute as the study has pinned.
    """
    kind = participants.devices[0].kind
    decided: dict[str, Slots] = {}  # by planning class: there may be hundreds of identical devices

    def share(device: DeviceProfile) -> Slots | None:
        if not can_take_part(device, pinned, kind):
            return None
        alike = planning_class(device)
        if alike not in decided:
            decided[alike] = share_device(
                device,
                plan_within,
                request=request,
                num_devices=len(participants.devices),
                devices_per_trial=participants.devices_per_trial,
                is_mps_on=is_mps_on,
            )
        return replace(decided[alike], device=device)

    return share


def share_device(
    device: DeviceProfile,
    plan_within: PlanWithin,
    *,
    request: TuneRequest,
    num_devices: int,
    devices_per_trial: int = 1,
    is_mps_on: bool = False,
) -> Slots:
    """Return how many trials share a device, and with how many CPU threads each.

    Separate CPU cores get more done than cooperating ones: as many one-thread trials as there are cores and
    memory for.  On a GPU, the number with the highest predicted throughput.  Never so many that the search
    has fewer than MIN_ROUNDS rounds, nor more than --max-concurrent.
    """
    rounds = at_most_at_once(request.trials)
    at_most = min(max(1, rounds // num_devices), request.max_concurrent or rounds)
    usable = usable_bytes(device)
    if device.kind.traits.is_split_by_cores:
        whole = plan_within(device, usable)
        by_memory = usable // max(1, whole.estimate.total_bytes) if whole is not None else 1
        number = trials_on_cores(device.num_cores, by_memory=by_memory, at_most=at_most)
        return Slots(device=device, num_slots=number, num_threads=threads_each(device.num_cores, number))
    number = 1
    if devices_per_trial == 1:

        def fits(k: int) -> tuple[float, float] | None:
            plan = plan_within(device, usable // k) if k <= at_most else None
            return None if plan is None else (plan.predicted_tokens_per_s, plan.device_share)

        number = best_number(fits, assumed_overhead(device, is_mps_on=is_mps_on))
    return Slots(device=device, num_slots=number, num_threads=1)
