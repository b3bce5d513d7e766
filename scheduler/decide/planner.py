"""What fits: micro batch, accumulation and checkpointing for given settings on a given device.  Pure.

Only what changes memory and speed is chosen here; micro_batch x gradient_accumulation x data_parallel equals
the effective batch, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.recipe import (
    Checkpointing,
    MemoryEstimate,
    Method,
    RunTime,
    Sharding,
    StepRecipe,
    adapter_kind,
    why_not_sharded,
)
from autosft.profiles.units import gib
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings

#: A larger micro batch has to be this much faster to be worth its memory.
WORTHWHILE_SPEEDUP = 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpeed:
    """Predicted speed of a plan, in non-padding training tokens and seconds."""

    tokens_per_s: float  # of all devices
    run_s: float  # the whole run: training, evaluations, checkpoints
    device_share: float = 1.0  # of the time that the device is busy; the rest is Python's
    run_time: RunTime | None = None  # run_s by what takes it
    correction: float = 1.0  # of the cold prediction, by what earlier trials have measured


#: Memory of a step: (recipe, micro batch, truncation length, device) -> estimate.
Estimator = Callable[[StepRecipe, int, int, DeviceProfile], MemoryEstimate]
#: Speed of a run: (recipe, micro batch, settings, device, CPU threads) -> speed.
SpeedModel = Callable[[StepRecipe, int, TrainingSettings, DeviceProfile, int], StepSpeed]


class DoesNotFitError(UserError):
    """No plan fits; the message says what is missing and the remedy what would fit."""

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
class Candidate:
    """One way to run the settings, and how fast it is predicted to be."""

    recipe: StepRecipe
    micro_batch: int
    speed: StepSpeed


def plan(
    settings: TrainingSettings,
    pinned: PinnedSettings,
    *,
    device: DeviceProfile,
    budget_bytes: int,
    num_threads: int,
    estimate: Estimator,
    speed: SpeedModel,
    below_bytes: int | None = None,
    num_devices: int = 1,
) -> ExecutionPlan:
    """Return the fastest plan whose upper bound fits in `budget_bytes`; of nearly equal ones the smallest.

    On `num_devices` alike, each with so many bytes: as replicas (DDP) or shards (FSDP), and only where they
    divide the effective batch.  `below_bytes`: only plans predicted to need less than this (a plan that
    needed as much has run out of memory).  Memory costs a trace to predict and speed next to nothing, so ways
    to run are tried from the fastest down and `estimate` is asked for no more of them than it takes.  Raises
    DoesNotFitError when nothing fits.
    """

    def memory(one: Candidate) -> MemoryEstimate:
        return estimate(one.recipe, one.micro_batch, settings.seq_len, device)

    candidates = sorted(
        (
            Candidate(
                recipe=recipe,
                micro_batch=micro_batch,
                speed=speed(recipe, micro_batch, settings, device, num_threads),
            )
            for recipe, micro_batch in ways_to_run(settings, pinned, num_devices)
        ),
        key=lambda one: (-one.speed.tokens_per_s, one.micro_batch),
    )
    fitting: list[Candidate] = []
    for one in candidates:
        if fitting and one.speed.tokens_per_s * WORTHWHILE_SPEEDUP < fitting[0].speed.tokens_per_s:
            break
        need = memory(one)
        is_smaller = below_bytes is None or need.need.median_bytes < below_bytes
        if need.total_bytes <= budget_bytes and not need.untraced and is_smaller:
            fitting.append(one)
    if not fitting:
        smallest = min((memory(one) for one in candidates), key=lambda one: one.total_bytes)
        raise does_not_fit(smallest, settings, device, budget_bytes, num_devices)
    chosen = min(fitting, key=lambda one: (memory(one).total_bytes, one.micro_batch))
    expected = memory(chosen)
    return ExecutionPlan(
        device_name=device.name,
        micro_batch=chosen.micro_batch,
        gradient_accumulation=chosen.recipe.gradient_accumulation,
        data_parallel=num_devices,
        checkpointing=chosen.recipe.checkpointing,
        sharding=chosen.recipe.sharding,
        num_threads=num_threads,
        memory_cap_bytes=expected.total_bytes - expected.outside_bytes,
        estimate=expected,
        predicted_tokens_per_s=chosen.speed.tokens_per_s,
        predicted_duration_s=chosen.speed.run_s,
        device_share=chosen.speed.device_share,
        run_time=chosen.speed.run_time,
        speed_correction=chosen.speed.correction,
        reason=reason_for(chosen, candidates, fitting, memory, budget_bytes),
    )


def ways_to_run(
    settings: TrainingSettings, pinned: PinnedSettings, num_devices: int = 1
) -> Iterator[tuple[StepRecipe, int]]:
    """Yield every (recipe, micro batch) with micro batch x accumulation x devices == effective batch."""
    share, rest = divmod(settings.effective_batch_size, num_devices)
    assert not rest, (
        f"{num_devices} devices do not divide the effective batch {settings.effective_batch_size}"
    )
    shardings = [Sharding.NONE] if num_devices == 1 else [Sharding.DDP]
    kind = adapter_kind(settings.lora)
    if num_devices > 1 and not why_not_sharded(settings.method, pinned.precision, settings.optimizer, kind):
        shardings.append(Sharding.FSDP)
    for sharding in shardings:
        for checkpointing in (Checkpointing.OFF, Checkpointing.NON_REENTRANT):
            for micro_batch in divisors(share):
                recipe = recipe_for(settings, pinned, checkpointing, share // micro_batch)
                yield replace(recipe, sharding=sharding, data_parallel=num_devices), micro_batch


def gang_sizes(effective_batch_size: int, at_most: int) -> list[int]:
    """Return how many devices a trial may be spread over, ascending: the divisors of its batch above 1."""
    return [number for number in divisors(effective_batch_size) if 1 < number <= at_most]


def recipe_for(
    settings: TrainingSettings, pinned: PinnedSettings, checkpointing: Checkpointing, accumulation: int
) -> StepRecipe:
    """Return what the memory and speed models need to know of a trial on one device."""
    return StepRecipe(
        method=settings.method,
        lora=settings.lora,
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
    chosen: Candidate,
    candidates: Collection[Candidate],
    fitting: Collection[Candidate],
    memory: Callable[[Candidate], MemoryEstimate],
    budget_bytes: int,
) -> str:
    """Say in one sentence why this plan was chosen and not another."""
    words = f"micro batch {chosen.micro_batch}"
    if chosen.recipe.data_parallel > 1:
        words += f" on each of {chosen.recipe.data_parallel} devices"
    if chosen.recipe.checkpointing is not Checkpointing.OFF:
        words += " with activation checkpointing"
    faster = [
        one for one in candidates if one.speed.tokens_per_s > chosen.speed.tokens_per_s and one not in fitting
    ]
    if faster:
        least = min(faster, key=lambda one: memory(one).total_bytes)
        other = f"micro batch {least.micro_batch}"
        is_checkpointed = chosen.recipe.checkpointing is not Checkpointing.OFF
        if is_checkpointed and least.recipe.checkpointing is Checkpointing.OFF:
            other += " without it"
        return (
            f"{words} is the fastest that fits: {other} would need {gib(memory(least).total_bytes)} "
            f"of {gib(budget_bytes)}."
        )
    if chosen.recipe.gradient_accumulation == 1:
        return f"{words} is the whole effective batch."
    return f"{words}: larger ones are predicted to be no more than 3 % faster."


def does_not_fit(
    smallest: MemoryEstimate,
    settings: TrainingSettings,
    device: DeviceProfile,
    budget_bytes: int,
    num_devices: int = 1,
) -> DoesNotFitError:
    """Word what is missing and what would fit."""
    if smallest.untraced:
        return DoesNotFitError(
            not_promised(smallest) + " No trial is started on that.",
            remedy=smallest.way_out or None,
            smallest=smallest,
            settings=settings,
            device=device,
        )
    missing = smallest.total_bytes - budget_bytes
    remedies = [f"a shorter --seq-len than {settings.seq_len}"]
    where = f"each of {num_devices} {device.name}" if num_devices > 1 else device.name
    if settings.method is Method.FULL:
        remedies.insert(0, "--method lora")
    return DoesNotFitError(
        f"{settings.method.value} fine-tuning at length {settings.seq_len} needs "
        f"{gib(smallest.need.median_bytes)} (at most {gib(smallest.total_bytes)}) at micro batch 1 with "
        f"activation checkpointing; {where} has {gib(budget_bytes)} free: "
        f"{gib(max(0, missing))} are missing.",
        remedy=f"Would need less: {', '.join(remedies)}, or a device with more memory.",
        smallest=smallest,
        settings=settings,
        device=device,
    )


def not_promised(memory: MemoryEstimate) -> str:
    """Say of an estimate with something untraced in it why it promises nothing."""
    basis = "Without it the trace" if memory.method.startswith("trace") else "A closed form"
    what = ", nor ".join(memory.untraced)
    return (
        f"this run cannot be promised to fit: the memory model could not follow {what}. "
        f"{basis} gives {gib(memory.need.median_bytes + memory.outside_bytes)}, with a bound widened to "
        f"{gib(memory.total_bytes)}."
    )
