"""Which devices take part in a study, with which method, and how many trials share each of them.  Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile, usable_bytes
from autosft.profiles.recipe import Method
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.budget import DEFAULT_NUM_TRIALS
from autosft.scheduler.decide.self_measuring import Measuring
from autosft.scheduler.decide.sharing import assumed_overhead, best_number
from autosft.scheduler.study_run import Slots
from autosft.studies.request import TuneRequest
from autosft.studies.trial import ExecutionPlan

T = TypeVar("T")

#: A search learns from one round to the next: so many rounds at least.
MIN_ROUNDS = 3
#: Gangs that are tried where one device is too small for the default configuration.
GANG_SIZES = (2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Participants(Generic[T]):
    """The devices of a study, and what follows from them."""

    method: Method
    devices: tuple[DeviceProfile, ...]  # the one with the least memory first
    left_out: tuple[DeviceProfile, ...]  # too small for the default configuration
    num_devices: int  # that a trial takes of the first
    basis: T


def choose_participants(
    request: TuneRequest,
    devices: Sequence[DeviceProfile],
    basis: Callable[[Method, Sequence[DeviceProfile], int, Measuring], T],
) -> Participants[T]:
    """Return the method and devices, and what `basis(method, devices, devices per trial, measuring)` makes.

    All devices that the default configuration fits on take part.  The method is the one asked for; for auto
    it is full fine-tuning where that fits any device, else LoRA; where neither does, the first of them that
    fits several devices together.  `basis` raises DoesNotFitError where the default configuration does not
    fit the first of its devices; what it raises for the largest device is raised here when nothing fits.
    Where nothing bounds the memory, what is guessed to fit takes part; where nothing is, the last method is
    tried on the largest device.
    """
    methods = (Method.FULL, Method.LORA) if request.method == "auto" else (Method(request.method),)
    ascending = sorted(devices, key=lambda one: (usable_bytes(one), one.uuid))
    refused: planner.DoesNotFitError | None = None
    for method in methods:
        for several in without_the_smallest(ascending):
            try:
                found = basis(method, several, 1, Measuring.LIKELY)
            except planner.DoesNotFitError as error:
                refused = error
            else:
                return Participants(
                    method=method,
                    devices=tuple(several),
                    left_out=tuple(one for one in ascending if one not in several),
                    num_devices=1,
                    basis=found,
                )
    for method in methods:
        for gang, number in gangs(ascending, request.max_gpus_per_trial):
            try:
                found = basis(method, gang, number, Measuring.LIKELY)
            except planner.DoesNotFitError:
                continue
            left_out = tuple(one for one in ascending if one not in gang)
            return Participants(
                method=method, devices=tuple(gang), left_out=left_out, num_devices=number, basis=found
            )
    assert refused is not None, "there is at least one device"
    largest = ascending[-1:]
    try:
        found = basis(methods[-1], largest, 1, Measuring.ANYWAY)
    except planner.DoesNotFitError:
        raise refused from None
    return Participants(
        method=methods[-1],
        devices=tuple(largest),
        left_out=tuple(one for one in ascending if one not in largest),
        num_devices=1,
        basis=found,
    )


def without_the_smallest(ascending: Sequence[DeviceProfile]) -> Iterator[Sequence[DeviceProfile]]:
    """Yield all devices, then those above the smallest memory, and so on."""
    for position, device in enumerate(ascending):
        before = ascending[position - 1] if position else None
        if before is None or (before.name, usable_bytes(before)) != (device.name, usable_bytes(device)):
            yield ascending[position:]


def gangs(
    ascending: Sequence[DeviceProfile], at_most: int | None
) -> Iterator[tuple[Sequence[DeviceProfile], int]]:
    """Yield (devices alike, how many of them for one trial): the largest devices and smallest gangs first."""
    names = dict.fromkeys(one.name for one in reversed(ascending) if not one.is_mig)
    for name in names:
        alike = [one for one in ascending if one.name == name]
        for number in GANG_SIZES:
            if number <= min(len(alike), at_most or len(alike)):
                yield alike, number


def share_device(
    device: DeviceProfile,
    plan_within: Callable[[DeviceProfile, int], ExecutionPlan | None],
    *,
    request: TuneRequest,
    num_devices: int,
    devices_per_trial: int = 1,
    is_mps_on: bool = False,
) -> Slots:
    """Return how many trials share a device, with how many CPU threads each.

    `plan_within(device, bytes)` is the default configuration's plan, None where it does not fit.  CPU cores
    are cheaper apart than together: as many one-thread trials as there are cores and memory for.  On a GPU as
    many as is predicted to get most done.  Never so many that the search has fewer than three rounds to learn
    from, nor more than --max-concurrent.
    """
    rounds = math.ceil((request.trials or DEFAULT_NUM_TRIALS) / MIN_ROUNDS)
    at_most = min(max(1, rounds // num_devices), request.max_concurrent or rounds)
    usable = usable_bytes(device)
    if device.kind is DeviceKind.CPU:
        whole = plan_within(device, usable)
        by_memory = usable // max(1, whole.estimate.total_bytes) if whole is not None else 1
        number = max(1, min(device.num_cores, by_memory, at_most))
        return Slots(device=device, num_slots=number, num_threads=max(1, device.num_cores // number))
    number = 1
    if devices_per_trial == 1:

        def fits(k: int) -> tuple[float, float] | None:
            plan = plan_within(device, usable // k) if k <= at_most else None
            return None if plan is None else (plan.predicted_tokens_per_s, plan.device_share)

        number = best_number(fits, assumed_overhead(device, is_mps_on=is_mps_on))
    return Slots(device=device, num_slots=number, num_threads=1)
