"""Judge, tell, learn: what a report or an end of an attempt means for its trial and for the study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from autosft.profiles.errors import StudyFailedError, UserError
from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.speed.measured import MIN_STEPS
from autosft.profiles.units import gib
from autosft.scheduler.decide.history import ended_run
from autosft.scheduler.decide.measured_memory import MeasuredRun
from autosft.scheduler.decide.pruning import Decision, decide
from autosft.scheduler.events import NewBest, Note, TrialEnded, TrialMeasured
from autosft.scheduler.loop.colocation import keep_company, learn_speed
from autosft.scheduler.loop.disk import found_full
from autosft.scheduler.loop.state import Loop, Running
from autosft.scheduler.loop.target import passes_target
from autosft.scheduler.loop.transitions import is_loss, state_after
from autosft.scheduler.study_run import StudyRun
from autosft.studies.trial import (
    AttemptEnd,
    FailureKind,
    Measurement,
    StopReason,
    TrialRecord,
    TrialState,
)

#: So many broken trials in a row mean that the next one would break too.
MAX_FAILED_IN_A_ROW = 3

STOPS = {Decision.STOP: StopReason.PRUNED, Decision.PAUSE: StopReason.RUNG}


def remember(loop: Loop, trials: Sequence[TrialRecord]) -> None:
    """Take over what earlier runs of the study have measured."""
    loop.best = best_value(loop.run, trials)
    for trial in trials:
        for measurement in trial.measurements:
            keep_rung(loop, measurement)
            look_for_target(loop, measurement)
        if trial.state is TrialState.COMPLETED and trial.finished_at and trial.started_at:
            loop.durations_s.append(trial.finished_at - trial.started_at)


# Reports


def measured(loop: Loop, measurement: Measurement) -> None:
    """Record a report; after an evaluation decide whether the trial goes on."""
    trial = measurement.trial
    running = loop.running.get(trial)
    if running is None or running.job.attempt != measurement.attempt:
        return
    if not loop.records.record(measurement, now=loop.runner.now()):
        return  # a report of an attempt that is over
    if measurement.checkpoint is not None:  # at once: a running trial needs its last one only
        loop.records.tidy_checkpoints(loop.run.output_dir, keep_best=loop.run.keep_best)
    follow(loop, running, measurement)
    loop.observe(TrialMeasured(measurement=measurement))
    value = keep_rung(loop, measurement)
    if measurement.evaluation is None or value is None:
        return
    loop.num_lost.pop(trial, None)
    announce_best(loop, measurement, value)
    look_for_target(loop, measurement)
    rung = loop.rungs[measurement.evaluation]
    decision = decide(
        rung=measurement.evaluation,
        value=value,
        peers=[other for number, other in rung.items() if number != trial],
        rule=loop.run.rule,
        minimize=loop.run.minimize,
        is_protected=trial == 0,
    )
    if decision is not Decision.CONTINUE:
        stop(loop, running, STOPS[decision])


def follow(loop: Loop, running: Running, measurement: Measurement) -> None:
    """Correct when an attempt is expected to end, by its pace so far."""
    now, here = loop.runner.now(), (measurement.step, measurement.elapsed_s)
    if running.first is None:
        running.first = here
        key = measurement.trial, measurement.attempt
        loop.idle.stepped(key, first_step_at=now - measurement.elapsed_s)
    if measurement.remaining_s is not None:
        running.ends_at = now + measurement.remaining_s
    elif here[0] > running.first[0]:
        step_s = (here[1] - running.first[1]) / (here[0] - running.first[0])
        running.ends_at = now + (measurement.num_steps - here[0]) * step_s


def keep_rung(loop: Loop, measurement: Measurement) -> float | None:
    """Keep the metric of an evaluation for comparing others with it; not a number is the worst there is."""
    value = measurement.metric(loop.run.metric)
    if measurement.evaluation is not None and value is not None:
        worst = math.inf if loop.run.minimize else -math.inf
        rung = loop.rungs.setdefault(measurement.evaluation, {})
        rung[measurement.trial] = worst if math.isnan(value) else value
    return value


def announce_best(loop: Loop, measurement: Measurement, value: float) -> None:
    """Tell observers when a checkpoint is the best of the study so far."""
    if loop.best is None or (value < loop.best if loop.run.minimize else value > loop.best):
        loop.best = value
        loop.observe(NewBest(trial=measurement.trial, value=value, step=measurement.step))


def look_for_target(loop: Loop, measurement: Measurement) -> None:
    """Remember the first evaluation that passes the target of the study."""
    if loop.reached_target is None and passes_target(loop.run, measurement):
        loop.reached_target = measurement


def stop(loop: Loop, running: Running, reason: StopReason) -> None:
    """Ask a running attempt to end, once."""
    if running.stopping is None:
        running.stopping = reason
        loop.runner.stop(running.job.trial, running.job.attempt, reason)


# Ends


def ended(loop: Loop, end: AttemptEnd) -> None:
    """Turn the end of an attempt into the trial's next state, in one transaction, and learn from it."""
    running = loop.running.get(end.trial)
    if running is None or running.job.attempt != end.attempt:
        return
    if end.failure is FailureKind.WORKER_LOST and running.stopping is not None:
        end = replace(end, failure=None, stopped=running.stopping)  # it was to end, and it did
    if is_loss(end):
        loop.num_lost[end.trial] += 1
    state = state_after(
        end,
        loop.records.trial(end.trial),
        num_lost=loop.num_lost[end.trial],
        is_held=end.trial in loop.held,
    )
    loop.records.end_attempt(end, state, now=loop.runner.now())
    release(loop, running)
    record = loop.records.trial(end.trial)
    if end.failure is FailureKind.DISK_FULL:
        found_full(loop, end.trial)
    learn(loop, running, end, record)
    loop.records.tidy_checkpoints(loop.run.output_dir, keep_best=loop.run.keep_best)
    loop.observe(TrialEnded(record=record))
    fail_if_hopeless(loop, end, record)


def release(loop: Loop, running: Running) -> None:
    """Give the devices of an attempt back."""
    uuids, attempt = running.job.device_uuids, (running.job.trial, running.job.attempt)
    keep_company(loop, uuids)
    del loop.running[running.job.trial]
    for lease in running.leases:
        lease.release()
    busy = {uuid for other in loop.running.values() for uuid in other.job.device_uuids}
    loop.idle.gave_up(attempt)
    idle = [uuid for uuid in uuids if uuid not in busy or is_cpu(loop, uuid)]
    loop.idle.freed(idle, now=loop.runner.now())


def is_cpu(loop: Loop, uuid: str) -> bool:
    slots = loop.seen.get(uuid)
    return slots is not None and slots.device.kind is DeviceKind.CPU


def learn(loop: Loop, running: Running, end: AttemptEnd, record: TrialRecord) -> None:
    """Keep what was measured beside what was predicted, of memory and of speed."""
    speeds = [one.tokens_per_s for one in record.measurements if one.tokens_per_s]
    was_alone = bool(end.completed and speeds) and learn_speed(loop, running, speeds[-1])
    has_pace = was_alone and record.measurements[-1].num_steps >= MIN_STEPS
    run = ended_run(running.job, end)
    has_run = end.completed or end.stopped or end.failure is FailureKind.NON_FINITE_LOSS
    has_measured = bool(end.peak_allocated_bytes and has_run)
    if run.out_of_memory or has_measured:
        learn_memory(loop, end.trial, run)
    if has_measured or (run.out_of_memory and not run.while_evaluating):
        loop.records.add_memory_observation(
            trial=end.trial,
            attempt=end.attempt,
            plan=running.job.plan,
            allocated_bytes=end.peak_allocated_bytes,
            reserved_bytes=end.peak_reserved_bytes,
            out_of_memory=run.out_of_memory,
            tokens_per_s=speeds[-1] if has_pace else None,
            now=loop.runner.now(),
        )
    if end.completed and record.started_at is not None and record.finished_at is not None:
        loop.durations_s.append(record.finished_at - record.started_at)


def learn_memory(loop: Loop, trial: int, run: MeasuredRun) -> None:
    """Let every plan from here on count with what an attempt took, or that it ran out."""
    before, loop.measured = loop.measured, loop.measured.with_run(run)
    if run.measured_itself and not run.out_of_memory and loop.measured is not before:
        held = gib(run.held_bytes or 0)
        message = f"Trial {trial} has measured its memory: {held}. Later trials are planned with that."
        loop.observe(Note(message=message))


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


def close_paused(loop: Loop) -> None:
    """At the end of a study, stop the trials that were paused at a rung and did not earn the next one.

    Those that the user has paused stay as they are.
    """
    for trial in loop.records.unfinished():
        if trial.state is not TrialState.PAUSED:
            continue
        if trial.number in loop.held:
            message = (
                f"Trial {trial.number} stays paused. To finish it: autosft studies resume {loop.run.name}"
            )
            loop.observe(Note(message=f"{message} --trial {trial.number}, then run the same command again."))
            continue
        rung = trial.measurements[-1].evaluation if trial.measurements else None
        message = "" if rung is None else f"others were better at evaluation {rung}"
        loop.records.set_state(trial.number, TrialState.STOPPED, message=message, now=loop.runner.now())
        loop.observe(TrialEnded(record=loop.records.trial(trial.number)))
    loop.records.tidy_checkpoints(loop.run.output_dir, keep_best=loop.run.keep_best)


def best_value(run: StudyRun, trials: Sequence[TrialRecord]) -> float | None:
    """Return the best value over all trials that have one."""
    values = [one.value for one in trials if one.value is not None]
    if not values:
        return None
    return min(values) if run.minimize else max(values)
