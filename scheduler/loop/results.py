"""What a report or the end of an attempt means for its trial and for the study.  Writes `Loop.observed`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from autosft.profiles.errors import StudyFailedError, UserError
from autosft.profiles.speed.measured import MIN_STEPS
from autosft.profiles.units import gib
from autosft.scheduler.decide.history import ended_run
from autosft.scheduler.decide.measured_memory import MeasuredRun
from autosft.scheduler.decide.pruning import Decision, decide
from autosft.scheduler.events import NewBest, Note, TrialEnded, TrialMeasured
from autosft.scheduler.loop.attempts import (
    note_slowdown,
    remove_attempt,
    request_stop,
    update_predicted_end,
)
from autosft.scheduler.loop.backing_off import back_off, delay_lost, went_well
from autosft.scheduler.loop.colocation import record_speed
from autosft.scheduler.loop.disk import handle_full_disk
from autosft.scheduler.loop.state import Loop, Observations, RunningAttempt
from autosft.scheduler.loop.target import passes_target
from autosft.scheduler.loop.thawing import decide_to_go_on
from autosft.scheduler.loop.transitions import is_loss, state_after
from autosft.scheduler.loop.wanted import is_budget_spent_without, may_ask
from autosft.scheduler.study_run import StudyRun
from autosft.studies.trial import (
    AttemptEnd,
    FailureKind,
    Measurement,
    StopReason,
    TrialRecord,
    TrialState,
)

#: Number of consecutive broken trials after which the next one is expected to break too.
MAX_FAILED_IN_A_ROW = 3

#: Steps that took so many times their processor time say nothing of the speed of later ones: a method that
#: happened to run on a busy machine would look slower than those that did not.
HELD_UP = 1.5

STOP_REASONS = {Decision.STOP: StopReason.PRUNED, Decision.PAUSE: StopReason.RUNG}


def initial_observations(run: StudyRun) -> Observations:
    """Return what is known before the first trial: memory measured in earlier studies."""
    return Observations(memory=run.measured)


def restore_results(loop: Loop, trials: Sequence[TrialRecord]) -> None:
    """Restore what earlier runs of the study have measured."""
    loop.observed.best = best_value(loop.run, trials)
    for trial in trials:
        for measurement in trial.measurements:
            record_rung(loop, measurement)
            check_target(loop, measurement)
        if trial.state is TrialState.COMPLETED and trial.finished_at and trial.started_at:
            loop.observed.durations_s.append(trial.finished_at - trial.started_at)


def best_value(run: StudyRun, trials: Sequence[TrialRecord]) -> float | None:
    """Return the best value over all trials that have one."""
    values = [trial.value for trial in trials if trial.value is not None]
    if not values:
        return None
    return min(values) if run.minimize else max(values)


# Reports


def handle_measurement(loop: Loop, measurement: Measurement) -> None:
    """Record a report; after an evaluation, decide whether the trial continues."""
    attempt = loop.attempts.running.get(measurement.trial)
    if attempt is None or attempt.job.attempt != measurement.attempt:
        return
    if not loop.records.record(measurement, now=loop.runner.now()):
        return  # a report of an attempt that is over
    if measurement.checkpoint is not None:  # at once: a running trial needs its last one only
        loop.records.tidy_checkpoints(loop.run.output_dir, keep_best=loop.run.keep_best)
    note_slowdown(attempt, measurement)
    update_predicted_end(loop, attempt, measurement)
    loop.observe(TrialMeasured(measurement=measurement))
    value = record_rung(loop, measurement)
    if measurement.evaluation is None or value is None:
        return
    loop.observed.num_lost.pop(measurement.trial, None)
    went_well(loop)
    announce_best(loop, measurement, value)
    check_target(loop, measurement)
    decision = decide_at_rung(loop, measurement, value)
    if decision is not Decision.CONTINUE:
        request_stop(loop, attempt, STOP_REASONS[decision])


def record_rung(loop: Loop, measurement: Measurement) -> float | None:
    """Record the metric of an evaluation for comparison; NaN counts as the worst possible value."""
    value = measurement.metric(loop.run.metric)
    if measurement.evaluation is not None and value is not None:
        worst = math.inf if loop.run.minimize else -math.inf
        rung = loop.observed.rungs.setdefault(measurement.evaluation, {})
        rung[measurement.trial] = worst if math.isnan(value) else value
    return value


def announce_best(loop: Loop, measurement: Measurement, value: float) -> None:
    """Tell observers if a checkpoint is the best of the study so far."""
    best = loop.observed.best
    if best is None or (value < best if loop.run.minimize else value > best):
        loop.observed.best = value
        loop.observe(NewBest(trial=measurement.trial, value=value, step=measurement.step))


def check_target(loop: Loop, measurement: Measurement) -> None:
    """Record the first evaluation that passes the study's target."""
    if loop.observed.reached_target is None and passes_target(loop.run, measurement):
        loop.observed.reached_target = measurement


def decide_at_rung(loop: Loop, measurement: Measurement, value: float) -> Decision:
    """Decide whether a trial continues after an evaluation, compared with all that have reached it.

    The default configuration always continues: the gain of the search is measured against it.
    """
    assert measurement.evaluation is not None
    is_default, rule = loop.records.trial(measurement.trial).is_default, loop.run.rule
    if rule.thaws and not is_default and measurement.evaluation < rule.num_rungs:
        if is_budget_spent_without(loop, measurement.trial):
            return Decision.PAUSE
        return decide_to_go_on(loop, measurement, value=value, may_start=may_ask(loop))
    rung = loop.observed.rungs[measurement.evaluation]
    return decide(
        rung=measurement.evaluation,
        value=value,
        peers=[other for trial, other in rung.items() if trial != measurement.trial],
        rule=rule,
        minimize=loop.run.minimize,
        is_protected=is_default,
    )


# Ends


def handle_end(loop: Loop, end: AttemptEnd) -> None:
    """Turn the end of an attempt into the trial's next state, in one transaction, and learn from it."""
    attempt = loop.attempts.running.get(end.trial)
    if attempt is None or attempt.job.attempt != end.attempt:
        return
    if end.failure is FailureKind.WORKER_LOST and attempt.stop_reason is not None:
        end = replace(end, failure=None, stopped=attempt.stop_reason)  # it was asked to stop, and did
    if end.failure is FailureKind.HOST_OUT_OF_MEMORY and had_ram_to_itself(loop, attempt):
        end = replace(end, failure=FailureKind.OUT_OF_MEMORY)  # there are no fewer at once: fewer rows
    if is_loss(end):
        loop.observed.num_lost[end.trial] += 1
        delay_lost(loop, end.trial, num_lost=loop.observed.num_lost[end.trial])
    state = state_after(
        end,
        loop.records.trial(end.trial),
        num_lost=loop.observed.num_lost[end.trial],
        is_user_paused=end.trial in loop.user.paused_trials,
    )
    loop.records.end_attempt(end, state, now=loop.runner.now())
    remove_attempt(loop, attempt)
    record = loop.records.trial(end.trial)
    if end.failure is FailureKind.DISK_FULL:
        handle_full_disk(loop, end.trial)
    learn(loop, attempt, end, record)
    loop.records.tidy_checkpoints(loop.run.output_dir, keep_best=loop.run.keep_best)
    loop.observe(TrialEnded(record=record))
    if end.failure is not None and end.failure.is_of_surroundings:
        back_off(loop, end)
    elif end.completed:
        went_well(loop)
    raise_if_hopeless(loop, end, record)


def had_ram_to_itself(loop: Loop, attempt: RunningAttempt) -> bool:
    """Whether an attempt trains in RAM, and no other of the study was running."""
    slots = [loop.fleet.slots[uuid] for uuid in attempt.job.device_uuids if uuid in loop.fleet.slots]
    is_in_ram = bool(slots) and not any(slot.device.kind.traits.has_own_memory for slot in slots)
    return is_in_ram and len(loop.attempts.running) == 1


def learn(loop: Loop, attempt: RunningAttempt, end: AttemptEnd, record: TrialRecord) -> None:
    """Record the measured memory and speed with their predictions."""
    speeds = [report.tokens_per_s for report in record.measurements if report.tokens_per_s]
    was_alone = bool(end.completed and speeds) and record_speed(loop, attempt, speeds[-1])
    is_held_up = bool(attempt.slowdowns) and statistics.median(attempt.slowdowns) >= HELD_UP
    has_pace = was_alone and record.measurements[-1].num_steps >= MIN_STEPS and not is_held_up
    run = ended_run(attempt.job, end)
    has_run = end.completed or end.stopped or end.failure is FailureKind.NON_FINITE_LOSS
    has_measured = bool(end.peak_allocated_bytes and has_run)
    if run.out_of_memory or has_measured:
        learn_memory(loop, end.trial, run)
    if has_measured or (run.out_of_memory and not run.while_evaluating):
        loop.records.add_memory_observation(
            trial=end.trial,
            attempt=end.attempt,
            plan=attempt.job.plan,
            allocated_bytes=end.peak_allocated_bytes,
            reserved_bytes=end.peak_reserved_bytes,
            out_of_memory=run.out_of_memory,
            tokens_per_s=speeds[-1] if has_pace else None,
            now=loop.runner.now(),
        )
    if end.completed and record.started_at is not None and record.finished_at is not None:
        loop.observed.durations_s.append(record.finished_at - record.started_at)


def learn_memory(loop: Loop, trial: int, run: MeasuredRun) -> None:
    """Use an attempt's memory measurement, or that it ran out, in all further plans."""
    before = loop.observed.memory
    loop.observed.memory = before.with_run(run)
    if run.measured_itself and not run.out_of_memory and loop.observed.memory is not before:
        held = gib(run.held_bytes or 0)
        message = f"Trial {trial} has measured its memory: {held}. Later trials are planned with that."
        loop.observe(Note(message=message))


def raise_if_hopeless(loop: Loop, end: AttemptEnd, record: TrialRecord) -> None:
    """End the study if trials keep breaking, or cannot start, instead of asking forever.

    Raises StudyFailedError, and UserError for data that cannot be trained on.
    """
    if end.failure is FailureKind.NOT_STARTED:
        raise StudyFailedError(f"trial {end.trial} could not start, and none would: {end.message}")
    if record.state is not TrialState.FAILED:
        if record.state.is_finished:
            loop.observed.failed_in_a_row = 0
        return
    loop.observed.failed_in_a_row += 1
    if end.failure is FailureKind.BAD_DATA:
        raise UserError(end.message)
    if loop.observed.failed_in_a_row >= MAX_FAILED_IN_A_ROW or loop.records.num_finished() == 0:
        where = f" The log is {end.log_path}." if end.log_path else ""
        raise StudyFailedError(f"trial {end.trial} failed: {end.message}{where}")


def stop_unpromoted_trials(loop: Loop) -> None:
    """At the end of a study, stop the trials that were paused at a rung and not promoted.

    Trials that the user has paused stay paused.
    """
    for trial in loop.records.unfinished():
        if trial.state is not TrialState.PAUSED:
            continue
        if trial.number in loop.user.paused_trials:
            command = f"autosft studies resume {loop.run.name} --trial {trial.number}"
            message = f"Trial {trial.number} stays paused. To finish it: {command}, then run the same command"
            loop.observe(Note(message=f"{message} again."))
            continue
        rung = trial.measurements[-1].evaluation if trial.measurements else None
        why = "going on was worth less than others" if loop.run.rule.thaws else "others were better"
        message = "" if rung is None else f"{why} at evaluation {rung}"
        loop.records.set_state(trial.number, TrialState.STOPPED, message=message, now=loop.runner.now())
        loop.observe(TrialEnded(record=loop.records.trial(trial.number)))
    loop.records.tidy_checkpoints(loop.run.output_dir, keep_best=loop.run.keep_best)
