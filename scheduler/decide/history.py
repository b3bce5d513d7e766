"""Measurements of earlier trials, in the form that the memory and speed models use.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autosft.profiles.memory.calibration import Calibration, row_of
from autosft.profiles.speed.measured import KindOfRun, MeasuredSpeeds, SpeedRow
from autosft.scheduler.decide.measured_memory import MeasuredMemory, MeasuredRun, measured_memory
from autosft.scheduler.decide.planner import recipe_for
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    FailureKind,
    PinnedSettings,
    TrainingSettings,
    TrialJob,
)
from autosft.studies.values import MemoryObservation


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Everything that earlier trials have measured."""

    memory: Calibration = field(default_factory=Calibration)
    speed: MeasuredSpeeds = field(default_factory=MeasuredSpeeds)
    runs: tuple[tuple[str, MeasuredRun], ...] = ()  # (model fingerprint, what an attempt used)

    def measured_memory(self, model_fingerprint: str) -> MeasuredMemory:
        """Return the memory that trials of a model used, as far as it differs from predictions."""
        return measured_memory(run for model, run in self.runs if model == model_fingerprint)


NOTHING_LEARNED = Learned()


def learned_from(observations: Sequence[MemoryObservation]) -> Learned:
    """Collect what attempts of earlier trials have measured."""
    peaks = [
        row_of(
            observation.plan.estimate,
            observation.measured_allocated_bytes,
            out_of_memory=observation.out_of_memory,
        )
        for observation in observations
    ]
    speeds = [speed_row(observation) for observation in observations]
    return Learned(
        memory=Calibration(rows=tuple(row for row in peaks if row is not None)),
        speed=MeasuredSpeeds(rows=tuple(row for row in speeds if row is not None)),
        runs=tuple(
            (observation.model_fingerprint, observed_run(observation)) for observation in observations
        ),
    )


def observed_run(observation: MemoryObservation) -> MeasuredRun:
    """Return an observation's memory measurement."""
    return measured_run(
        observation.settings,
        observation.pinned,
        observation.plan,
        peak_bytes=observation.measured_allocated_bytes,
        reserved_bytes=observation.measured_reserved_bytes,
        out_of_memory=observation.out_of_memory,
    )


def measured_run(
    settings: TrainingSettings,
    pinned: PinnedSettings,
    plan: ExecutionPlan,
    *,
    peak_bytes: int | None,
    reserved_bytes: int | None,
    out_of_memory: bool,
    while_evaluating: bool = False,
) -> MeasuredRun:
    """Return what an attempt used, next to what it was planned with."""
    pinned = pinned_for(pinned, plan)
    recipe = recipe_for(settings, pinned, plan.checkpointing, plan.gradient_accumulation)
    return MeasuredRun(
        recipe=replace(recipe, sharding=plan.sharding, data_parallel=plan.data_parallel),
        micro_batch=plan.micro_batch,
        longest=plan.estimate.longest or settings.seq_len,
        device_name=plan.device_name,
        cap_bytes=plan.memory_cap_bytes,
        peak_bytes=peak_bytes,
        reserved_bytes=reserved_bytes,
        out_of_memory=out_of_memory,
        predicted=plan.estimate,
        while_evaluating=while_evaluating,
        measured_itself=plan.measures_itself,
    )


def ended_run(job: TrialJob, end: AttemptEnd) -> MeasuredRun:
    """Return the memory measurement from the end of an attempt."""
    return measured_run(
        job.settings,
        job.pinned,
        job.plan,
        peak_bytes=end.peak_allocated_bytes,
        reserved_bytes=end.peak_reserved_bytes,
        out_of_memory=end.failure is not None and end.failure.is_out_of_device_memory,
        while_evaluating=end.failure is FailureKind.EVALUATION_OUT_OF_MEMORY,
    )


def pinned_for(pinned: PinnedSettings, plan: ExecutionPlan) -> PinnedSettings:
    """Return the pinned settings with a plan's evaluation batch, if it was reduced."""
    if plan.eval_micro_batch is None:
        return pinned
    return replace(pinned, eval_micro_batch=plan.eval_micro_batch)


def speed_row(observation: MemoryObservation) -> SpeedRow | None:
    """Return a trial's speed relative to the prediction; None if it had no undisturbed speed."""
    plan = observation.plan
    if not observation.measured_tokens_per_s or plan.predicted_tokens_per_s <= 0:
        return None
    cold = plan.predicted_tokens_per_s / plan.speed_correction
    kind = KindOfRun(
        model_fingerprint=observation.model_fingerprint,
        device_name=observation.device_name,
        num_threads=plan.num_threads,
        method=observation.settings.method,
        precision=observation.pinned.precision,
    )
    return SpeedRow(kind=kind, ratio=observation.measured_tokens_per_s / cold)
