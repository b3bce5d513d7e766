"""Judge, tell, learn: what a report or an end of an attempt means for its trial and for the study."""

from __future__ import annotations

from collections.abc import Sequence

from autosft.profiles.errors import UserError
from autosft.scheduler.events import NewBest, TrialEnded, TrialMeasured
from autosft.scheduler.outcome import state_after
from autosft.scheduler.pruning import Decision, decide
from autosft.scheduler.study_run import Loop, StudyFailedError, StudyRun
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    FailureKind,
    Measurement,
    StopReason,
    TrialRecord,
    TrialState,
)

#: So many broken trials in a row mean that the next one would break too.
MAX_FAILED_IN_A_ROW = 3


def measured(loop: Loop, measurement: Measurement) -> None:
    """Record a report; after an evaluation decide whether the trial goes on."""
    trial = measurement.trial
    running = loop.running.get(trial)
    if running is None or running.job.attempt != measurement.attempt:
        return
    if not loop.records.record(measurement, now=loop.runner.now()):
        return  # a report of an attempt that is over
    loop.observe(TrialMeasured(measurement=measurement))
    value = measurement.metric(loop.run.metric)
    if measurement.evaluation is None or value is None:
        return
    announce_best(loop, measurement, value)
    decision = decide(
        rung=measurement.evaluation,
        value=value,
        peers=values_at(loop, measurement.evaluation, other_than=trial),
        rule=loop.run.rule,
        minimize=loop.run.minimize,
        is_protected=trial == 0,
    )
    if decision is Decision.STOP and not running.stopping:
        running.stopping = True
        loop.runner.stop(trial, measurement.attempt, StopReason.PRUNED)


def values_at(loop: Loop, evaluation: int, *, other_than: int) -> list[float]:
    """Return the metric of all other trials at the same evaluation."""
    return [
        value
        for one in loop.records.trials()
        if one.number != other_than
        for measurement in one.measurements
        if measurement.evaluation == evaluation and (value := measurement.metric(loop.run.metric)) is not None
    ]


def announce_best(loop: Loop, measurement: Measurement, value: float) -> None:
    """Tell observers when a checkpoint is the best of the study so far."""
    if loop.best is None or (value < loop.best if loop.run.minimize else value > loop.best):
        loop.best = value
        loop.observe(NewBest(trial=measurement.trial, value=value, step=measurement.step))


def ended(loop: Loop, end: AttemptEnd) -> None:
    """Turn the end of an attempt into the trial's next state, in one transaction, and learn from it."""
    running = loop.running.get(end.trial)
    if running is None or running.job.attempt != end.attempt:
        return
    state = state_after(end, loop.records.trial(end.trial))
    loop.records.end_attempt(end, state, now=loop.runner.now())
    del loop.running[end.trial]
    running.lease.release()
    record = loop.records.trial(end.trial)
    learn(loop, running.job.plan, end, record)
    loop.records.tidy_checkpoints(loop.run.output_dir, keep_best=loop.run.keep_best)
    loop.observe(TrialEnded(record=record))
    fail_if_hopeless(loop, end, record)


def learn(loop: Loop, plan: ExecutionPlan, end: AttemptEnd, record: TrialRecord) -> None:
    """Keep what was measured beside what was predicted: memory for the model, speed for this study."""
    out_of_memory = end.failure is FailureKind.OUT_OF_MEMORY
    if out_of_memory or (end.peak_allocated_bytes and (end.completed or end.stopped)):
        loop.records.add_memory_observation(
            trial=end.trial,
            attempt=end.attempt,
            plan=plan,
            allocated_bytes=end.peak_allocated_bytes,
            reserved_bytes=end.peak_reserved_bytes,
            out_of_memory=out_of_memory,
            now=loop.runner.now(),
        )
    speeds = [one.tokens_per_s for one in record.measurements if one.tokens_per_s]
    if end.completed and speeds and plan.predicted_tokens_per_s > 0:
        loop.speed_ratios.append(speeds[-1] / plan.predicted_tokens_per_s)


def fail_if_hopeless(loop: Loop, end: AttemptEnd, record: TrialRecord) -> None:
    """End the study when trials keep breaking, instead of asking for ever."""
    if record.state is not TrialState.FAILED:
        loop.failed_in_a_row = 0 if record.state.is_finished else loop.failed_in_a_row
        return
    loop.failed_in_a_row += 1
    if end.failure is FailureKind.BAD_DATA:
        raise UserError(end.message)
    if loop.failed_in_a_row >= MAX_FAILED_IN_A_ROW or loop.records.num_finished() == 0:
        where = f" The log is {end.log_path}." if end.log_path else ""
        raise StudyFailedError(f"trial {end.trial} failed: {end.message}{where}")


def best_value(run: StudyRun, trials: Sequence[TrialRecord]) -> float | None:
    """Return the best value over all trials that have one."""
    values = [one.value for one in trials if one.value is not None]
    if not values:
        return None
    return min(values) if run.minimize else max(values)
