"""Ask, plan, place, run: which trial comes next, and how it gets its device."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from autosft.scheduler import planner
from autosft.scheduler.events import TrialEnded, TrialStarted, Waiting
from autosft.scheduler.outcome import ran_out_of_memory
from autosft.scheduler.placement import DeviceState, Placement, place
from autosft.scheduler.pruning import expected_cost
from autosft.scheduler.study_run import Loop, Running, usable_bytes
from autosft.studies.checkpoints import trial_dir
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import ExecutionPlan, TrialJob, TrialRecord, TrialState

#: How often a run that waits for others says so.
WAIT_NOTICE_S = 60.0


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
