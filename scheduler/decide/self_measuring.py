"""Plans for trials that measure their own memory because nothing bounds it.  Pure.

If a step cannot be traced, or used more than predicted, it is not refused: a trial runs alone on its devices,
capped at what is free there, and rehearses its largest batches after the first step.  A trial that runs out
of memory is retried with fewer rows; one that succeeds is the estimate of later trials (`measured_memory`).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.recipe import Checkpointing, MemoryEstimate
from autosft.profiles.units import gib
from autosft.scheduler.decide.measured_memory import MEASURED, MeasuredMemory, rests_on_trials, upper_bytes
from autosft.scheduler.decide.planner import (
    WORTHWHILE_SPEEDUP,
    Candidate,
    Costs,
    DoesNotFitError,
    Room,
    candidates_by_speed,
    describe_guess,
    execution_plan,
    not_followed,
    plan,
    would_need_less,
)
from autosft.studies.trial import ExecutionPlan, Measurement, PinnedSettings, TrainingSettings
from autosft.workers.processes.memory_limit import without_room


class Measuring(enum.Enum):
    """Whether a trial may measure its own memory."""

    NEVER = "never"  #: plan only what is known to fit
    LIKELY = "likely"  #: if it is guessed to fit
    ANYWAY = "anyway"  #: even if it is guessed not to fit: a guess is no reason to refuse


def plan_or_measure(
    settings: TrainingSettings, pinned: PinnedSettings, room: Room, costs: Costs, measuring: Measuring
) -> ExecutionPlan:
    """Return the fastest plan that is known to fit; if there is none, one that measures itself.

    Such a plan has its devices to itself: `room` has to be all that is free there.  Raises DoesNotFitError if
    nothing is left to try.
    """
    try:
        return plan(settings, pinned, room, costs)
    except DoesNotFitError as error:
        if measuring is Measuring.NEVER:
            raise
        made = plan_to_measure(settings, pinned, room, costs, measuring)
        if made is not None:
            return made
        raise error if not error.smallest.untraced else nothing_left(error, settings, room, costs) from error


def plan_to_measure(
    settings: TrainingSettings, pinned: PinnedSettings, room: Room, costs: Costs, measuring: Measuring
) -> ExecutionPlan | None:
    """Return the plan that the next trial measures itself with, None if nothing is left to try."""
    cap_bytes = measuring_cap_bytes(room.device, room.budget_bytes)
    options = [
        _Option(candidate=candidate, guess=guess, settings=settings, room=room, measured=costs.measured)
        for candidate in candidates_by_speed(settings, pinned, room, costs)
        for guess in [costs.memory(candidate.recipe, candidate.micro_batch, settings.seq_len, room.device)]
    ]
    chosen = first_to_measure(options, measuring) if cap_bytes > 0 else None
    if chosen is None:
        return None
    return measuring_plan(chosen.candidate, chosen.guess, room, cap_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """A way to run that may be measured, and what is known or guessed about it."""

    candidate: Candidate
    guess: MemoryEstimate
    settings: TrainingSettings
    room: Room
    measured: MeasuredMemory

    @property
    def longest(self) -> int:
        return self.guess.longest or self.settings.seq_len

    @property
    def guessed_bytes(self) -> int:
        return self.guess.need.median_bytes + self.guess.outside_bytes

    @property
    def is_open(self) -> bool:
        """Whether it is unknown if it fits."""
        candidate, name = self.candidate, self.room.device.name
        memory = candidate.memory
        if memory.refused or not (memory.untraced or rests_on_trials(memory)):
            return False
        if self.measured.ran_out(candidate.recipe, candidate.micro_batch, self.longest, name):
            return False
        known = self.measured.known_need_bytes(candidate.recipe, candidate.micro_batch, self.longest, name)
        return known + self.guess.outside_bytes <= self.room.budget_bytes

    @property
    def rows_that_ran_out(self) -> int | None:
        return self.measured.rows_that_ran_out(self.candidate.recipe, self.longest, self.room.device.name)

    @property
    def is_guessed_smaller(self) -> bool:
        """Whether it is guessed to need less than everything that ran out of memory."""
        least = self.measured.guess_that_ran_out(self.candidate.recipe, self.room.device.name)
        return least is None or self.guess.need.median_bytes < least


def first_to_measure(options: Sequence[_Option], measuring: Measuring) -> _Option | None:
    """Return the way to run with which the next trial measures itself; `options` are ordered by speed.

    The first time, the fastest that is guessed to fit; among nearly equal ones, the smallest.  After one that
    ran out of memory, those with fewer rows: down to a micro batch of 1, and then with activation
    checkpointing.
    """
    left = [option for option in options if option.is_open]
    untried = [option for option in left if option.rows_that_ran_out is None]
    likely = [
        option
        for option in untried
        if option.is_guessed_smaller and option.guessed_bytes <= option.room.budget_bytes
    ]
    if likely:
        fastest = likely[0].candidate.speed.tokens_per_s
        fast = [
            option for option in likely if option.candidate.speed.tokens_per_s * WORTHWHILE_SPEEDUP >= fastest
        ]
        return min(fast, key=lambda option: (option.guessed_bytes, option.candidate.micro_batch))
    fewer = [option for option in left if option not in untried and _has_fewer_rows(option)]
    if fewer:
        smaller = [option for option in fewer if option.is_guessed_smaller]
        return min(smaller or fewer, key=_by_rows)
    if measuring is Measuring.ANYWAY:
        return min(
            untried, key=lambda option: (option.guessed_bytes, option.candidate.micro_batch), default=None
        )
    return None


def _has_fewer_rows(option: _Option) -> bool:
    rows = option.rows_that_ran_out
    return rows is None or option.candidate.micro_batch < rows or option.candidate.micro_batch == 1


def _by_rows(option: _Option) -> tuple[int, bool, int]:
    """Sort key after out of memory: most rows first, without activation checkpointing first."""
    is_checkpointed = option.candidate.recipe.checkpointing is not Checkpointing.OFF
    return -option.candidate.micro_batch, is_checkpointed, option.guessed_bytes


def measuring_plan(chosen: Candidate, guess: MemoryEstimate, room: Room, cap_bytes: int) -> ExecutionPlan:
    """Return the plan of a trial that measures itself under a cap."""
    untraced = guess.untraced or chosen.memory.untraced or (ONLY_BOUNDED_ABOVE,)
    made = execution_plan(
        chosen, replace(guess, untraced=untraced), room, cap_bytes=cap_bytes - guess.outside_bytes, reason=""
    )
    return replace(made, measures_itself=True, reason=reason_to_measure(made))


#: What is unknown about a step if only a larger one has been measured.
ONLY_BOUNDED_ABOVE = "how much less the step takes than a larger one that was measured"


def measuring_cap_bytes(device: DeviceProfile, free_bytes: int) -> int:
    """Return the cap of a trial that measures itself within `free_bytes`, which include the context.

    A CPU trial's enforced limit is above its cap (`memory_limit.with_room`), and exceeding RAM harms the
    whole machine: the limit has to stay within what is free.
    """
    return free_bytes if device.kind.traits.has_own_memory else without_room(free_bytes)


def capped_at(made: ExecutionPlan, device: DeviceProfile, free_bytes: int) -> ExecutionPlan | None:
    """Return a self-measuring plan capped at what is free now.

    None if that is less than the guess of its need: then it waits for other trials to end.
    """
    assert made.measures_itself
    cap_bytes = min(made.booked_bytes, measuring_cap_bytes(device, free_bytes))
    guess = made.estimate
    if cap_bytes < min(made.booked_bytes, guess.need.median_bytes + guess.outside_bytes):
        return None
    capped = replace(made, memory_cap_bytes=cap_bytes - guess.outside_bytes)
    return replace(capped, reason=reason_to_measure(capped))


def capped_at_peak(made: ExecutionPlan, measurements: Sequence[Measurement]) -> ExecutionPlan:
    """Return a plan capped at what its trial is known to hold, for work that needs no more than that.

    A self-measuring plan was capped at all free memory; any other plan is returned unchanged.
    """
    peaks = [
        measurement.peak_reserved_bytes or measurement.peak_allocated_bytes or 0
        for measurement in measurements
    ]
    if not made.measures_itself or not any(peaks):
        return made
    return replace(made, memory_cap_bytes=min(made.memory_cap_bytes, upper_bytes(max(peaks))))


def reason_to_measure(made: ExecutionPlan) -> str:
    """Describe in one sentence how a trial that measures itself runs."""
    text = f"micro batch {made.micro_batch}"
    if made.checkpointing is not Checkpointing.OFF:
        text += " with activation checkpointing"
    return (
        f"{text}, measured, not predicted: the trial runs alone on its "
        f"device{'s' if made.data_parallel > 1 else ''}, capped at {gib(made.booked_bytes)}, and rehearses "
        "its largest batches first."
    )


def describe_memory(made: ExecutionPlan, *, per: str = "") -> str:
    """Describe what a plan needs, `per` trial for example, and how that is known."""
    memory = made.estimate
    if made.measures_itself:
        devices = "devices" if made.data_parallel > 1 else "device"
        return (
            f"measured, not predicted: the first trial measures itself, alone on its {devices} and capped at "
            f"{gib(made.booked_bytes)}, since {not_followed(memory)}. {describe_guess(memory)}"
        )
    median_bytes = memory.need.median_bytes + memory.outside_bytes
    each = f" per {per}" if per else ""
    needs = f"needs {gib(median_bytes)} (at most {gib(memory.total_bytes)}){each}"
    if memory.method == MEASURED:
        number = memory.num_calibration_rows
        return f"{needs}, measured, not predicted: {number} earlier trial{'s' if number > 1 else ''} took it"
    return f"{needs}, predicted by {memory.method}"


def nothing_left(
    refused: DoesNotFitError, settings: TrainingSettings, room: Room, costs: Costs
) -> DoesNotFitError:
    """Return an error that says that everything that could be tried has run out of memory."""
    device = room.device
    if not costs.measured.has_run_out(device.name):
        what = f"{gib(room.budget_bytes)} are free on {device.name}, too little to try in"
        message = f"{not_followed(refused.smallest)}, and {what}."
    else:
        message = (
            f"micro batch 1 with activation checkpointing, at length {settings.seq_len}, ran out of memory "
            f"on {device.name}, where {gib(room.budget_bytes)} are free."
        )
    return DoesNotFitError(
        message,
        remedy=would_need_less(settings),
        smallest=refused.smallest,
        settings=settings,
        device=device,
    )
