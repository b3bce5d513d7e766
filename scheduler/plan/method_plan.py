"""What `autosft plan` shows: how each method would run on a device, and what would fit if it does not.

Pure over the memory and speed models; nothing is trained or loaded.  Memory is predicted only if it decides
something, since each prediction costs a trace or a replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.memory_ways import EXACT, MemoryWay
from autosft.profiles.recipe import (
    Checkpointing,
    Method,
    Precision,
)
from autosft.profiles.speed.step_work import num_trained, saved_bytes
from autosft.scheduler.decide.cpu_precision import speedup_in_bf16
from autosft.scheduler.decide.measured_memory import rests_on_trials
from autosft.scheduler.decide.planner import (
    WORTHWHILE_SPEEDUP,
    Room,
)
from autosft.scheduler.decide.self_measuring import Measuring, plan_to_measure
from autosft.scheduler.plan.forecast import (
    Candidate,
    Forecast,
    Way,
    fits,
    preferred_fitting,
    smallest_way,
)
from autosft.scheduler.plan.remedies import Remedy, cards, remedies
from autosft.studies.trial import ExecutionPlan, TrainingSettings

#: Numbers of devices that are compared.
NUMS_DEVICES = (1, 2, 4)
#: Numbers of devices that a trial may take together, below all that there are.
GANG_SIZES = (2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodPlan:
    """What one method can do on a device."""

    settings: TrainingSettings
    memory: str  # how what is trained is held: the name of a row of `memory_ways.WAYS`
    precision: Precision
    num_trained: int
    num_total: int  # parameters of the model
    saved_bytes: int  # of a checkpoint's weights
    front: tuple[Way, ...]  # on one device: each needs more memory than the one before it, and is faster
    chosen: Way | None  # the one that the planner chooses
    largest_micro_batches: tuple[tuple[Checkpointing, int], ...]  # that fit on one device
    smallest: Way  # least memory on one device, whether it fits or not
    measured_with: Way | None  # how the first trial measures itself, if nothing bounds its memory
    measuring_cap_bytes: int  # its cap in that case
    by_num_devices: tuple[tuple[int, Way | None], ...]  # the fastest that fits; None if none does
    remedies: tuple[Remedy, ...]  # empty if something fits
    together: Way | None = None  # on the fewest of several devices at hand, if there are several
    #: Over fp32, predicted, of a CPU that trains in bf16 autocast by default.
    speedup_in_bf16: float | None = None

    @property
    def method(self) -> Method:
        return self.settings.method


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAnswer:
    """Whether a known device can run a method: the fastest way that fits, or the smallest that does not."""

    device: str
    usable_bytes: int
    method: Method
    fits: bool
    way: Way
    is_measured: bool = False  # by its first trial, since nothing bounds its memory


def plan_method(
    settings: TrainingSettings,
    device: DeviceProfile,
    forecast: Forecast,
    at_hand: int = 1,
    *,
    way: MemoryWay = EXACT,
) -> MethodPlan:
    """Return everything that `autosft plan` shows about one method on a device, of which `at_hand` are there.

    With the threads that a study would give each trial: on a CPU more, the fewer trials fit at once.
    """
    if way.optimizer is not None:
        settings = replace(settings, optimizer=way.optimizer)
        forecast = forecast.in_precision(way.precision)
    plan = plan_in_bf16(settings, device, forecast, at_hand) or plan_settled(
        settings, device, forecast, at_hand
    )
    return plan if way is EXACT else replace(plan, memory=way.name)


def plan_in_bf16(
    settings: TrainingSettings, device: DeviceProfile, forecast: Forecast, at_hand: int
) -> MethodPlan | None:
    """Return the plan of a study on a CPU that multiplies in bf16 by default; None where it does not."""
    if forecast.precision is not None or device.kind.traits.trains_in_16_bit:
        return None
    ratio = speedup_in_bf16(forecast.models, settings, forecast.pinned(settings, device), device)
    if ratio is None:
        return None
    plan = plan_settled(settings, device, forecast.in_precision(Precision.BF16_AUTOCAST), at_hand)
    return None if plan.chosen is None else replace(plan, speedup_in_bf16=ratio)


def plan_settled(
    settings: TrainingSettings, device: DeviceProfile, forecast: Forecast, at_hand: int
) -> MethodPlan:
    """Return a plan with the threads that a study would give each trial of its size."""
    plan = plan_with_threads(settings, device, forecast, at_hand)
    if plan.chosen is None:
        return plan
    settled = forecast.settled(device, plan.chosen.memory.total_bytes)
    return plan if settled is forecast else plan_with_threads(settings, device, settled, at_hand)


def nums_compared(device: DeviceProfile, at_hand: int) -> tuple[int, ...]:
    """Return the numbers of devices to compare: up to what is at hand, or as an outlook if that is one."""
    if not device.kind.traits.forms_gangs:
        return (1,)
    if at_hand == 1:
        return NUMS_DEVICES
    return tuple(sorted({1, at_hand, *(num for num in GANG_SIZES if num < at_hand)}))


def plan_with_threads(
    settings: TrainingSettings, device: DeviceProfile, forecast: Forecast, at_hand: int
) -> MethodPlan:
    """Return the same with the forecast's number of threads."""
    candidates = forecast.ways(settings, device, 1)
    ways = list(ways_worth_weighing(candidates, settings, device, forecast))
    fitting = [way for way in ways if fits(way, device)]
    front = pareto_front(fitting)
    chosen = preferred(front)
    smallest = min(ways, key=lambda way: (way.memory.total_bytes, way.micro_batch))
    first = None if front else self_measured(ways, settings, device, forecast)
    by_num_devices = tuple(
        (num, chosen if num == 1 else preferred_fitting(settings, device, num, forecast))
        for num in nums_compared(device, at_hand)
    )
    together = [way for num, way in by_num_devices if way is not None and 1 < num <= at_hand]
    recipe = candidates[0].recipe
    trained = num_trained(forecast.model, recipe)
    return MethodPlan(
        settings=settings,
        memory=EXACT.name,
        precision=recipe.precision,
        num_trained=trained,
        num_total=forecast.model.num_parameters,
        saved_bytes=saved_bytes(forecast.model, recipe),
        front=front,
        chosen=chosen,
        largest_micro_batches=largest_micro_batches(fitting),
        smallest=smallest,
        by_num_devices=by_num_devices,
        together=together[0] if together else None,
        measured_with=None if first is None else forecast.weigh_plan(first, settings, device),
        measuring_cap_bytes=0 if first is None else first.booked_bytes,
        remedies=() if front or first or together else tuple(remedies(settings, device, forecast)),
    )


def self_measured(
    ways: Sequence[Way], settings: TrainingSettings, device: DeviceProfile, forecast: Forecast
) -> ExecutionPlan | None:
    """Return the plan of a first trial that measures itself; None if all `ways` are bounded.

    Only if one step could not be traced are others predicted: each may cost a trace.
    """
    if not any(way.memory.untraced or rests_on_trials(way.memory) for way in ways):
        return None
    pinned = forecast.pinned(settings, device)
    room = Room(device=device, budget_bytes=usable_bytes(device), num_threads=forecast.num_threads)
    return plan_to_measure(settings, pinned, room, forecast.models.costs, Measuring.ANYWAY)


def ways_worth_weighing(
    candidates: Sequence[Candidate], settings: TrainingSettings, device: DeviceProfile, forecast: Forecast
) -> Iterator[Way]:
    """Yield all ways that fit, and the smallest of those that do not.

    Once a micro batch does not fit, larger ones are not predicted, except for the entire batch at once, which
    accumulates nothing.
    """
    for checkpointing in Checkpointing:
        alike = [candidate for candidate in candidates if candidate.recipe.checkpointing is checkpointing]
        by_size = sorted(alike, key=lambda candidate: candidate.micro_batch)
        for candidate in by_size[:-1]:
            way = forecast.weigh(candidate, settings, device)
            yield way
            if not fits(way, device):
                break
        if by_size:
            yield forecast.weigh(by_size[-1], settings, device)


def pareto_front(ways: Sequence[Way]) -> tuple[Way, ...]:
    """Return the ways that no other beats in both memory and speed, smallest first."""
    front: list[Way] = []
    for way in sorted(ways, key=lambda way: (way.memory.total_bytes, -way.tokens_per_s)):
        if not front or way.tokens_per_s > front[-1].tokens_per_s:
            front.append(way)
    return tuple(front)


def preferred(front: Sequence[Way]) -> Way | None:
    """Return the smallest way that is nearly as fast as the fastest, as the planner chooses."""
    fastest = max((way.tokens_per_s for way in front), default=0.0)
    return next((way for way in front if way.tokens_per_s * WORTHWHILE_SPEEDUP >= fastest), None)


def largest_micro_batches(fitting: Sequence[Way]) -> tuple[tuple[Checkpointing, int], ...]:
    """Return the largest micro batch that fits without and with activation checkpointing."""
    return tuple(
        (checkpointing, max(sizes))
        for checkpointing in Checkpointing
        if (
            sizes := [
                candidate.micro_batch for candidate in fitting if candidate.checkpointing is checkpointing
            ]
        )
    )


def what_gpu(settings: TrainingSettings, forecast: Forecast) -> Iterator[DeviceAnswer]:
    """Yield for every known device, smallest first, whether it can run the settings and how fast.

    Those that do not compute in the forecast's precision are left out.
    """
    needs_bf16 = forecast.precision is not None and "bf16" in forecast.precision.value
    for device in cards():
        if needs_bf16 and not device.supports_bf16:
            continue
        way = preferred_fitting(settings, device, 1, forecast)
        smallest = way or smallest_way(forecast.ways(settings, device, 1), settings, device, forecast)
        first = None if way else self_measured([smallest], settings, device, forecast)
        measured = None if first is None else forecast.weigh_plan(first, settings, device)
        yield DeviceAnswer(
            device=device.name,
            usable_bytes=usable_bytes(device),
            method=settings.method,
            fits=way is not None,
            way=measured or smallest,
            is_measured=measured is not None,
        )
