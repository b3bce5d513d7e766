"""The loop: ask, plan, place, run, judge, tell, learn.

Everything that decides is a plain function elsewhere (`planner`, `placement`, `pruning`); everything that
acts is behind a seam (`records` for the database, `runner` for processes and devices, `leases` for what
other programs hold).  This module only says in which order.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from autosft.profiles.errors import UserError
from autosft.profiles.hardware import DeviceKind, DeviceProfile
from autosft.scheduler import planner
from autosft.scheduler.events import (
    NewBest,
    Note,
    Observer,
    TrialEnded,
    TrialMeasured,
    TrialStarted,
    Waiting,
)
from autosft.scheduler.outcome import ran_out_of_memory, state_after
from autosft.scheduler.placement import DeviceState, Placement, place
from autosft.scheduler.pruning import Decision, PruningRule, decide, expected_cost
from autosft.studies.checkpoints import trial_dir
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    FailureKind,
    Measurement,
    PinnedSettings,
    StopReason,
    TrialJob,
    TrialRecord,
    TrialState,
)
from autosft.workers.runner import TrialRunner

#: So many broken trials in a row mean that the next one would break too.
MAX_FAILED_IN_A_ROW = 3
#: How often a run that waits for others says so.
WAIT_NOTICE_S = 60.0
#: How long one wait for events lasts: the latency of Ctrl+C and of the heartbeat.
POLL_S = 0.5


class Lease(Protocol):
    """Bytes of a device that are ours until released or until this process dies."""

    def release(self) -> None: ...


class LeaseBroker(Protocol):
    """Keeps several autosft processes of a machine from booking the same bytes."""

    def acquire(
        self, device: DeviceProfile, num_bytes: int, *, num_threads: int, study: str, trial: int, until: float
    ) -> Lease | None:
        """Return a lease, or None when other holders leave too little."""
        ...

    def holders(self, device: DeviceProfile) -> str:
        """Say in words who holds what until about when."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many trials share a device, and with how many CPU threads each."""

    device: DeviceProfile
    num_slots: int
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """A prepared study: what `run_study` needs to know and nothing it has to find out."""

    name: str
    model: str
    data_dir: str
    output_dir: Path
    metric: str
    minimize: bool
    num_trials: int
    deadline: float | None  # UNIX seconds
    pinned: PinnedSettings
    rule: PruningRule
    slots: tuple[Slots, ...]
    keep_best: int  # checkpoints kept over the whole study
    trust_remote_code: bool
    estimate: planner.Estimator
    speed: planner.SpeedModel


class StudyFailedError(Exception):
    """The work itself keeps failing: exit code 1."""


@dataclass(slots=True)
class Running:
    """An attempt that holds a device."""

    job: TrialJob
    lease: Lease
    promised_bytes: int
    stopping: bool = False


@dataclass(slots=True)
class Loop:
    """The changing part of a study that is being run."""

    run: StudyRun
    records: StudyRecords
    runner: TrialRunner
    leases: LeaseBroker
    observe: Observer
    stop_requested: Callable[[], bool]
    running: dict[int, Running] = field(default_factory=dict)
    failed_in_a_row: int = 0
    speed_ratios: list[float] = field(default_factory=list)  # measured over predicted tokens/s
    last_wait: float = 0.0  # when the user was last told what is waited for
    is_leaving: bool = False
    best: float | None = None


def run_study(
    run: StudyRun,
    *,
    records: StudyRecords,
    runner: TrialRunner,
    leases: LeaseBroker,
    observe: Observer,
    stop_requested: Callable[[], bool],
) -> None:
    """Run trials until the study has as many finished ones as were asked for, or its time is over.

    Trials that an earlier run left unfinished are taken up first.  `stop_requested` turns true when the user
    wants to leave: running trials save a checkpoint and stay unfinished.  Raises StudyFailedError when trials
    keep failing and UserError when nothing that was asked for can fit.
    """
    loop = Loop(
        run=run, records=records, runner=runner, leases=leases, observe=observe, stop_requested=stop_requested
    )
    records.recover(now=runner.now())
    records.tidy_checkpoints(run.output_dir, keep_best=run.keep_best)
    loop.best = best_value(run, records.trials())
    while True:
        leave_if_asked(loop)
        is_waiting = start_trials(loop)
        if not loop.running and not is_waiting:
            return
        for event in runner.events(POLL_S):
            if isinstance(event, Measurement):
                measured(loop, event)
            else:
                ended(loop, event)
        records.heartbeat(now=runner.now())


# Ask, plan, place, run


def start_trials(loop: Loop) -> bool:
    """Start as many trials as there is room for; say whether one is waiting for room."""
    while not loop.is_leaving:
        trial = next_trial(loop)
        if trial is None:
            return False
        try:
            plan, devices = plan_trial(loop, trial)
        except planner.DoesNotFitError as error:
            give_up(loop, trial, error)
            continue
        placement = place(plan.estimate.total_bytes, devices)
        if placement is None or not start(loop, trial, plan, placement):
            return True
    return False


def next_trial(loop: Loop) -> TrialRecord | None:
    """Return the next trial that wants a device: one left unfinished, else a new one within the budget."""
    if not any(state.free_slots for state in device_states(loop)):
        return None
    waiting = [one for one in loop.records.unfinished() if one.number not in loop.running]
    runnable = [one for one in waiting if one.state is TrialState.WAITING]
    if runnable:
        return runnable[0]
    num_open = len(loop.running) + len(waiting)
    if loop.records.num_finished() + num_open >= loop.run.num_trials or not time_for_another(loop):
        return None
    return loop.records.ask(now=loop.runner.now())


def time_for_another(loop: Loop) -> bool:
    """Whether a further trial is expected to end before the deadline."""
    if loop.run.deadline is None:
        return True
    done = [
        one.finished_at - one.started_at
        for one in loop.records.trials()
        if one.state is TrialState.COMPLETED and one.finished_at and one.started_at
    ]
    expected_s = (statistics.median(done) if done else 0.0) * expected_cost(loop.run.rule)
    return loop.runner.now() + expected_s < loop.run.deadline


def plan_trial(loop: Loop, trial: TrialRecord) -> tuple[ExecutionPlan, Sequence[DeviceState]]:
    """Plan a trial for the fastest device on which it fits, with a fair share of it if that suffices."""
    refused: planner.DoesNotFitError | None = None
    below_bytes = trial.plan.estimate.need.median_bytes if ran_out_of_memory(trial) and trial.plan else None
    for slots in sorted(loop.run.slots, key=lambda one: -(one.device.matmul_flops_per_s or 0.0)):
        usable = usable_bytes(slots.device)
        for budget_bytes in dict.fromkeys((usable // slots.num_slots, usable)):
            try:
                plan = planner.plan(
                    trial.settings,
                    loop.run.pinned,
                    device=slots.device,
                    budget_bytes=budget_bytes,
                    num_threads=slots.num_threads,
                    estimate=loop.run.estimate,
                    speed=loop.run.speed,
                    below_bytes=below_bytes,
                )
            except planner.DoesNotFitError as error:
                refused = error
            else:
                return corrected(loop, plan), [
                    one for one in device_states(loop) if one.device.name == slots.device.name
                ]
    assert refused is not None, "a study has at least one device"
    raise refused


def corrected(loop: Loop, plan: ExecutionPlan) -> ExecutionPlan:
    """Correct the predicted duration by what trials of this study have measured so far."""
    if not loop.speed_ratios:
        return plan
    ratio = statistics.median(loop.speed_ratios)
    return replace(
        plan,
        predicted_tokens_per_s=plan.predicted_tokens_per_s * ratio,
        predicted_duration_s=plan.predicted_duration_s / ratio,
    )


def usable_bytes(device: DeviceProfile) -> int:
    """What trials may take of a device: all that is free on a GPU, nine tenths of free RAM on a CPU."""
    return device.free_bytes if device.kind is DeviceKind.CUDA else device.free_bytes * 9 // 10


def device_states(loop: Loop) -> list[DeviceState]:
    """Return what is left of every device once the running trials have what they were promised."""
    states = []
    for slots in loop.run.slots:
        uuid = slots.device.uuid
        here = [one for one in loop.running.values() if uuid in one.job.device_uuids]
        states.append(
            DeviceState(
                device=slots.device,
                free_bytes=usable_bytes(slots.device) - sum(one.promised_bytes for one in here),
                free_slots=slots.num_slots - len(here),
            )
        )
    return states


def start(loop: Loop, trial: TrialRecord, plan: ExecutionPlan, placement: Placement) -> bool:
    """Lease the device, write the attempt down, and run it; False when another program holds the device."""
    run, now = loop.run, loop.runner.now()
    [device] = [slots.device for slots in run.slots if slots.device.uuid in placement.device_uuids]
    lease = loop.leases.acquire(
        device,
        plan.estimate.total_bytes,
        num_threads=plan.num_threads,
        study=run.name,
        trial=trial.number,
        until=now + plan.predicted_duration_s,
    )
    if lease is None:
        if now - loop.last_wait >= WAIT_NOTICE_S:
            loop.observe(Waiting(message=loop.leases.holders(device)))
            loop.last_wait = now
        return False
    attempt = loop.records.begin_attempt(
        trial.number, plan=plan, device_uuids=placement.device_uuids, now=now
    )
    job = TrialJob(
        study=run.name,
        trial=trial.number,
        attempt=attempt,
        model=run.model,
        data_dir=run.data_dir,
        output_dir=str(trial_dir(run.output_dir, trial.number)),
        settings=trial.settings,
        pinned=run.pinned,
        plan=plan,
        device_uuids=placement.device_uuids,
        resume_from=resume_point(loop.records, trial.number),
        save_resume_state=True,
        trust_remote_code=run.trust_remote_code,
    )
    loop.running[trial.number] = Running(job=job, lease=lease, promised_bytes=plan.estimate.total_bytes)
    loop.runner.run(job)
    loop.observe(
        TrialStarted(
            record=loop.records.trial(trial.number), attempt=attempt, device_names=(plan.device_name,)
        )
    )
    return True


def resume_point(records: StudyRecords, trial: int) -> str | None:
    """Return the last checkpoint that a trial can go on from."""
    ours = [one for one in records.checkpoints() if one.trial == trial and one.has_resume_state]
    return max(ours, key=lambda one: one.step).path if ours else None


def give_up(loop: Loop, trial: TrialRecord, error: planner.DoesNotFitError) -> None:
    """Record that no plan is left for a trial."""
    loop.records.set_state(trial.number, TrialState.INFEASIBLE, message=str(error), now=loop.runner.now())
    loop.observe(TrialEnded(record=loop.records.trial(trial.number)))


# Judge, tell, learn


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


# Leaving


def leave_if_asked(loop: Loop) -> None:
    """On the user's wish or at the deadline, ask every running trial to end and start no other."""
    if loop.is_leaving:
        return
    if loop.stop_requested():
        reason = StopReason.SHUTDOWN
        loop.observe(Note(message="Stopping: running trials save a checkpoint and stay unfinished."))
    elif loop.run.deadline is not None and loop.runner.now() >= loop.run.deadline:
        reason = StopReason.BUDGET
        loop.observe(Note(message="The time budget is over: running trials end here."))
    else:
        return
    loop.is_leaving = True
    for trial, running in loop.running.items():
        loop.runner.stop(trial, running.job.attempt, reason)


def best_value(run: StudyRun, trials: Sequence[TrialRecord]) -> float | None:
    """Return the best value over all trials that have one."""
    values = [one.value for one in trials if one.value is not None]
    if not values:
        return None
    return min(values) if run.minimize else max(values)


__all__ = ["Loop", "Slots", "StudyFailedError", "StudyRun", "run_study"]
