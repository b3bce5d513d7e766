"""Chooses micro batch, gradient accumulation and checkpointing for given settings on a given device.  Pure.

These change memory and speed only: micro_batch x gradient_accumulation x data_parallel equals the effective
batch, exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.optimizers import why_not_sharded
from autosft.profiles.recipe import (
    Checkpointing,
    MemoryEstimate,
    Method,
    RunTime,
    Sharding,
    StepRecipe,
    adapter_kind,
)
from autosft.profiles.units import gib
from autosft.scheduler.decide.measured_memory import NOTHING_MEASURED, MeasuredMemory
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings

#: Minimum speed-up that justifies the memory of a larger micro batch.
WORTHWHILE_SPEEDUP = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpeed:
    """Predicted speed of a plan, in non-padding training tokens and seconds."""

    tokens_per_s: float  # of all devices
    run_s: float  # of the entire run: training, evaluations, checkpoints
    device_share: float = 1.0  # share of the time that the device is busy; the rest is Python overhead
    run_time: RunTime | None = None  # breakdown of run_s
    correction: float = 1.0  # factor on the uncorrected prediction, from measured trials


#: Memory of a step: (recipe, micro batch, truncation length, device) -> estimate.
Estimator = Callable[[StepRecipe, int, int, DeviceProfile], MemoryEstimate]
#: Speed of a run: (recipe, micro batch, settings, device, CPU threads) -> speed.
SpeedModel = Callable[[StepRecipe, int, TrainingSettings, DeviceProfile, int], StepSpeed]


class DoesNotFitError(UserError):
    """No plan fits; the message says what is missing, and the remedy what would fit."""

    def __init__(
        self,
        message: str,
        *,
        remedy: str | None,
        smallest: MemoryEstimate,
        settings: TrainingSettings,
        device: DeviceProfile,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.smallest, self.settings, self.device = smallest, settings, device


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The costs of a way to run: predicted memory and speed, and memory measured by trials."""

    memory: Estimator
    speed: SpeedModel
    measured: MeasuredMemory = NOTHING_MEASURED

    def memory_of(
        self, recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile
    ) -> MemoryEstimate:
        """Return the memory of a step: as measured by trials if known, else as predicted."""
        predicted = self.memory(recipe, micro_batch, seq_len, device)
        return self.measured.estimate(predicted, recipe, micro_batch, seq_len, device.name)

    def taking_guesses(self) -> Costs:
        """Return the same costs with guesses treated as predictions.

        For decisions that are harmless if the guess is wrong, such as how many trials could share a device.
        """

        def guessed(
            recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile
        ) -> MemoryEstimate:
            return replace(self.memory_of(recipe, micro_batch, seq_len, device), untraced=())

        return Costs(memory=guessed, speed=self.speed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The resources of a plan: memory and threads on each of a number of identical devices."""

    device: DeviceProfile
    budget_bytes: int
    num_threads: int = 1  # CPU threads of each process
    num_devices: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run the settings, with its predicted costs."""

    recipe: StepRecipe
    micro_batch: int
    speed: StepSpeed
    weigh: Callable[[StepRecipe, int], MemoryEstimate]  # costs a trace; cached

    @property
    def memory(self) -> MemoryEstimate:
        return self.weigh(self.recipe, self.micro_batch)


def plan(settings: TrainingSettings, pinned: PinnedSettings, room: Room, costs: Costs) -> ExecutionPlan:
    """Return the fastest plan whose upper bound fits; among nearly equal ones, the smallest.

    Several devices are used as replicas (DDP) or shards (FSDP), and only if they divide the effective batch.
    Predicting memory costs a trace, and predicting speed next to nothing, so ways to run are tried from the
    fastest down, and memory is predicted for no more of them than necessary.  Raises DoesNotFitError if
    nothing is known to fit; if that is because nothing is known, `self_measuring.plan_to_measure` has a plan.
    """
    candidates = candidates_by_speed(settings, pinned, room, costs)
    fitting = fastest_that_fit(candidates, room.budget_bytes)
    if not fitting:
        smallest = min(
            (candidate.memory for candidate in candidates),
            key=lambda memory: (bool(memory.refused), memory.total_bytes),
        )
        raise does_not_fit(smallest, settings, room)
    chosen = min(fitting, key=lambda candidate: (candidate.memory.total_bytes, candidate.micro_batch))
    return execution_plan(
        chosen,
        chosen.memory,
        room,
        cap_bytes=chosen.memory.total_bytes - chosen.memory.outside_bytes,
        reason=reason_for(chosen, candidates, fitting, room.budget_bytes),
    )


def candidates_by_speed(
    settings: TrainingSettings, pinned: PinnedSettings, room: Room, costs: Costs
) -> list[Candidate]:
    """Return all ways to run the settings, fastest first."""

    @functools.cache
    def weigh(recipe: StepRecipe, micro_batch: int) -> MemoryEstimate:
        return costs.memory_of(recipe, micro_batch, settings.seq_len, room.device)

    candidates = (
        Candidate(
            recipe=recipe,
            micro_batch=micro_batch,
            speed=costs.speed(recipe, micro_batch, settings, room.device, room.num_threads),
            weigh=weigh,
        )
        for recipe, micro_batch in ways_to_run(settings, pinned, room.num_devices)
    )
    return sorted(candidates, key=lambda candidate: (-candidate.speed.tokens_per_s, candidate.micro_batch))


def fastest_that_fit(candidates: Sequence[Candidate], budget_bytes: int) -> list[Candidate]:
    """Return the fastest candidate that is known to fit, and those that fit and are nearly as fast."""
    fitting: list[Candidate] = []
    for candidate in candidates:
        if fitting and candidate.speed.tokens_per_s * WORTHWHILE_SPEEDUP < fitting[0].speed.tokens_per_s:
            break
        if is_known_to_fit(candidate.memory, budget_bytes):
            fitting.append(candidate)
    return fitting


def is_known_to_fit(memory: MemoryEstimate, budget_bytes: int) -> bool:
    """Whether a step's upper bound is known and within the budget."""
    return memory.total_bytes <= budget_bytes and not memory.untraced and not memory.refused


def execution_plan(
    chosen: Candidate, memory: MemoryEstimate, room: Room, *, cap_bytes: int, reason: str
) -> ExecutionPlan:
    """Return the plan that runs a candidate under a cap."""
    return ExecutionPlan(
        device_name=room.device.name,
        micro_batch=chosen.micro_batch,
        gradient_accumulation=chosen.recipe.gradient_accumulation,
        data_parallel=room.num_devices,
        checkpointing=chosen.recipe.checkpointing,
        sharding=chosen.recipe.sharding,
        num_threads=room.num_threads,
        memory_cap_bytes=cap_bytes,
        estimate=memory,
        predicted_tokens_per_s=chosen.speed.tokens_per_s,
        predicted_duration_s=chosen.speed.run_s,
        device_share=chosen.speed.device_share,
        run_time=chosen.speed.run_time,
        speed_correction=chosen.speed.correction,
        reason=reason,
    )


def ways_to_run(
    settings: TrainingSettings, pinned: PinnedSettings, num_devices: int = 1
) -> Iterator[tuple[StepRecipe, int]]:
    """Yield all (recipe, micro batch) with micro batch x accumulation x devices == effective batch."""
    share, rest = divmod(settings.effective_batch_size, num_devices)
    assert not rest, (
        f"{num_devices} devices do not divide the effective batch {settings.effective_batch_size}"
    )
    shardings = [Sharding.NONE] if num_devices == 1 else [Sharding.DDP]
    kind = adapter_kind(settings.adapter)
    if num_devices > 1 and not why_not_sharded(settings.method, pinned.precision, settings.optimizer, kind):
        shardings.append(Sharding.FSDP)
    for sharding in shardings:
        for checkpointing in (Checkpointing.OFF, Checkpointing.NON_REENTRANT):
            for micro_batch in divisors(share):
                recipe = recipe_for(settings, pinned, checkpointing, share // micro_batch)
                yield replace(recipe, sharding=sharding, data_parallel=num_devices), micro_batch


def gang_sizes(effective_batch_size: int, at_most: int) -> list[int]:
    """Return the numbers of devices that a trial may use, ascending: the divisors of its batch above 1."""
    return [number for number in divisors(effective_batch_size) if 1 < number <= at_most]


def recipe_for(
    settings: TrainingSettings, pinned: PinnedSettings, checkpointing: Checkpointing, accumulation: int
) -> StepRecipe:
    """Return what the memory and speed models need to know about a trial on one device."""
    return StepRecipe(
        method=settings.method,
        adapter=settings.adapter,
        precision=pinned.precision,
        optimizer=settings.optimizer,
        checkpointing=checkpointing,
        attention=pinned.attention,
        gradient_accumulation=accumulation,
        max_grad_norm=settings.max_grad_norm,
        padding_free=pinned.padding_free,
        order=settings.order if pinned.padding_free else None,
        loss=pinned.loss,
        trainer=pinned.trainer,
        sorts_steps=True,
        max_rounds=settings.max_rounds,
        eval_micro_batch=pinned.eval_micro_batch or None,
        eval_seq_len=pinned.eval_seq_len,
        generation=pinned.generation,
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number in ascending order."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def reason_for(
    chosen: Candidate, candidates: Collection[Candidate], fitting: Collection[Candidate], budget_bytes: int
) -> str:
    """Explain in one sentence why this plan was chosen."""
    text = f"micro batch {chosen.micro_batch}"
    if chosen.recipe.data_parallel > 1:
        text += f" on each of {chosen.recipe.data_parallel} devices"
    if chosen.recipe.checkpointing is not Checkpointing.OFF:
        text += " with activation checkpointing"
    faster = [
        candidate
        for candidate in candidates
        if candidate.speed.tokens_per_s > chosen.speed.tokens_per_s and candidate not in fitting
    ]
    if faster:
        least = min(faster, key=lambda candidate: candidate.memory.total_bytes)
        other = f"micro batch {least.micro_batch}"
        is_checkpointed = chosen.recipe.checkpointing is not Checkpointing.OFF
        if is_checkpointed and least.recipe.checkpointing is Checkpointing.OFF:
            other += " without it"
        if least.memory.untraced:
            return f"{text} is the fastest that is known to fit."
        return (
            f"{text} is the fastest that fits: {other} would need {gib(least.memory.total_bytes)} "
            f"of {gib(budget_bytes)}."
        )
    if chosen.recipe.gradient_accumulation == 1:
        return f"{text} is the whole effective batch."
    return f"{text}: larger ones are predicted to be no more than 3 % faster."


def does_not_fit(smallest: MemoryEstimate, settings: TrainingSettings, room: Room) -> DoesNotFitError:
    """Return an error that says what is missing and what would fit."""
    device, number = room.device, room.num_devices
    if smallest.refused:
        message, remedies = f"{smallest.refused}.", [smallest.way_out]
    elif smallest.untraced:
        message, remedies = f"nothing bounds the memory of this run: {not_followed(smallest)}.", []
    else:
        where = f"each of {number} {device.name}" if number > 1 else device.name
        missing = max(0, smallest.total_bytes - room.budget_bytes)
        message = (
            f"{settings.method.value} fine-tuning at length {settings.seq_len} needs "
            f"{gib(smallest.need.median_bytes)} (at most {gib(smallest.total_bytes)}) at micro batch 1 with "
            f"activation checkpointing; {where} has {gib(room.budget_bytes)} free: "
            f"{gib(missing)} are missing."
        )
        remedies = [would_need_less(settings)]
    return DoesNotFitError(
        message,
        remedy=" ".join(remedy for remedy in remedies if remedy) or None,
        smallest=smallest,
        settings=settings,
        device=device,
    )


def would_need_less(settings: TrainingSettings) -> str:
    """Return flags that would reduce the memory of a request."""
    changes = ["--method lora"] if settings.method is Method.FULL else []
    changes.append(f"a shorter --seq-len than {settings.seq_len}")
    return f"Would need less: {', '.join(changes)}, or a device with more memory."


def not_followed(memory: MemoryEstimate) -> str:
    """Return what the memory model could not follow in a step, as text."""
    return f"the memory model could not follow {', nor '.join(memory.untraced)}"


def describe_guess(memory: MemoryEstimate) -> str:
    """Describe the guess for a step that could not be traced entirely, and that it is a guess."""
    basis = "The trace without it" if memory.method.startswith("trace") else "A closed form"
    return f"{basis} guesses {gib(memory.need.median_bytes + memory.outside_bytes)}: a guess, not a bound"
