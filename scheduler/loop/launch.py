"""Which trial comes next, and how it gets its devices: ask, plan, place, start."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from autosft.profiles.hardware.device import usable_bytes
from autosft.profiles.units import gib
from autosft.scheduler.decide.history import pinned_for
from autosft.scheduler.decide.occupancy import DeviceState, Resident, device_state
from autosft.scheduler.decide.placement import (
    Placement,
    Request,
    cluster_s,
    place,
)
from autosft.scheduler.decide.pruning import promotions
from autosft.scheduler.decide.self_measuring import capped_at
from autosft.scheduler.events import Note, TrialStarted
from autosft.scheduler.loop.attempts import add_attempt
from autosft.scheduler.loop.backing_off import is_backing_off, is_delayed
from autosft.scheduler.loop.colocation import sharing_overhead
from autosft.scheduler.loop.disk import disk_shortage
from autosft.scheduler.loop.fleet import shrink
from autosft.scheduler.loop.plan_trial import forget_plans, plans_for, resume_point
from autosft.scheduler.loop.prompt_race import race_against_best
from autosft.scheduler.loop.state import Loop, RunningAttempt, TrialPlan
from autosft.scheduler.loop.thawing import next_step, paused_at_rungs, stop_least_promising, thawed_trial
from autosft.scheduler.loop.user_commands import mark_started
from autosft.scheduler.loop.waiting import notify_waiting
from autosft.scheduler.loop.wanted import is_budget_spent, may_ask
from autosft.scheduler.study_run import ENQUEUED_ORIGIN, Lease
from autosft.studies.files.checkpoints import trial_dir, trial_url
from autosft.studies.search.space import Parameters
from autosft.studies.trial import ExecutionPlan, TrialJob, TrialRecord, TrialState

#: Priority of a trial that has not been asked yet: behind all others.
LAST = 1 << 30


def start_trials(loop: Loop) -> bool:
    """Start as many trials as there is room for; return whether a trial is waiting for room."""
    while not loop.shutdown.has_begun and not loop.user.is_paused:
        waiting = waiting_trials(loop)
        if (waiting or may_ask(loop)) and is_backing_off(loop):
            return True
        trials = {trial.number: trial for trial in waiting if not is_delayed(loop, trial.number)}
        at_most = loop.run.max_concurrent
        if at_most is not None and len(loop.attempts.running) >= at_most:
            return bool(waiting)
        plans = {number: found for number, trial in trials.items() if (found := plans_for(loop, trial))}
        requests = [request_for(loop, trials[number], found) for number, found in plans.items()]
        devices = device_states(loop)
        now = loop.runner.now()
        work_ends_at = predicted_end_of_work(loop, requests, devices, now=now)
        placement = place(requests, devices, now=now, work_ends_at=work_ends_at)
        if (trials or may_ask(loop)) and (shortage := disk_shortage(loop)) is not None:
            if loop.run.rule.thaws and stop_least_promising(loop):
                continue
            notify_waiting(loop, shortage)
            loop.idle.exclude()
            return True
        if placement is not None:
            planned = plans[placement.trial][placement.option]
            if not start(loop, trials[placement.trial], planned, placement):
                return True
        elif may_ask(loop) and has_room_for_another(loop, requests, devices):
            loop.records.ask(now=now, proposed=proposed_parameters(loop))
        else:
            return is_waiting(loop)
    return False


def is_waiting(loop: Loop) -> bool:
    """Whether a trial waits for room although none can be placed."""
    waiting = waiting_trials(loop)
    if not loop.fleet.slots and may_ask(loop):
        notify_waiting(loop, "Waiting: there is no device.")
        return True
    if not waiting:
        loop.idle.exclude()
    return bool(waiting)


# Which trials


def waiting_trials(loop: Loop) -> list[TrialRecord]:
    """Return the trials that need devices: waiting ones, and paused ones that earned their next rung."""
    unfinished = [
        trial
        for trial in loop.records.unfinished()
        if trial.number not in loop.attempts.running and trial.number not in loop.user.paused_trials
    ]
    paused = {trial.number for trial in unfinished if trial.state is TrialState.PAUSED}
    promoted = promoted_trials(loop, paused)
    return [trial for trial in unfinished if trial.state is TrialState.WAITING or trial.number in promoted]


def promoted_trials(loop: Loop, paused: Collection[int]) -> Collection[int]:
    """Return the trials paused at a rung that have earned the next one."""
    if not paused:
        return ()
    if loop.run.rule.thaws:
        thawed = None if is_budget_spent(loop) else thawed_trial(loop, paused, may_start=may_ask(loop))
        return () if thawed is None else (thawed,)
    if is_budget_spent(loop):
        return ()
    return promotions(
        loop.observed.rungs,
        paused,
        rule=loop.run.rule,
        minimize=loop.run.minimize,
        is_last_call=not may_ask(loop),
    )


def proposed_parameters(loop: Loop) -> Parameters | None:
    """Return what a freeze-thaw search tries next; None where the sampler proposes."""
    if not loop.run.rule.thaws or loop.records.has_queued():
        return None
    return next_step(loop, paused_at_rungs(loop), may_start=True).parameters


def has_room_for_another(loop: Loop, requests: Sequence[Request], devices: Sequence[DeviceState]) -> bool:
    """Whether a new trial could start at once, assuming that it needs what the last planned one needs.

    The sampler is asked only then: a trial that has to wait would have been chosen without the results that
    come in the meantime.
    """
    options = tuple(option for option in loop.plans.latest_options if option.kind in loop.fleet.groups)
    if not options or not (requests or loop.attempts.running):
        return not requests and any(not device.residents for device in devices)
    now = loop.runner.now()
    another = Request(trial=LAST, options=options, priority=LAST)
    work_ends_at = predicted_end_of_work(loop, requests, devices, now=now)
    placement = place([*requests, another], devices, now=now, work_ends_at=work_ends_at)
    return placement is not None and placement.trial == LAST


def predicted_end_of_work(
    loop: Loop, requests: Sequence[Request], devices: Sequence[DeviceState], *, now: float
) -> float:
    """Return when all running, waiting and future trials would end, spread evenly over the devices."""
    num_by_group = {name: group.num_devices for name, group in loop.fleet.groups.items()}
    num_open = len(loop.records.unfinished())
    num_to_come = max(0, loop.run.num_trials - loop.records.num_finished() - num_open)
    waiting_s = sum(cluster_s(request.options, num_by_group) for request in requests)
    waiting_s += num_to_come * cluster_s(loop.plans.latest_options, num_by_group)
    left_s = [
        max((resident.ends_at - now for resident in device.residents), default=0.0) for device in devices
    ]
    return now + waiting_s + sum(left_s) / max(1, len(left_s))


def request_for(loop: Loop, trial: TrialRecord, plans: Sequence[TrialPlan]) -> Request:
    """Request devices: first for trials that a user wants or the default, then for those that have begun."""
    if trial.number in loop.user.prioritized_trials or trial.is_default or trial.origin == ENQUEUED_ORIGIN:
        priority = 0
    else:
        priority = 1 if trial.num_attempts else 2
    return Request(trial=trial.number, options=tuple(plan.option for plan in plans), priority=priority)


def device_states(loop: Loop) -> list[DeviceState]:
    """Return every device with the running trials that use it."""
    residents: dict[str, list[Resident]] = {uuid: [] for uuid in loop.fleet.slots}
    for _, attempt in sorted(loop.attempts.running.items()):
        resident = Resident(
            num_bytes=attempt.option.num_bytes,
            load=attempt.option.load,
            ends_at=attempt.ends_at,
            is_alone=attempt.option.num_devices > 1 or attempt.option.is_alone,
        )
        for uuid in attempt.job.device_uuids:
            if uuid in residents:  # the device may have left
                residents[uuid].append(resident)
    return [
        device_state(
            device=slots.device,
            kind=loop.fleet.group_of[uuid],
            usable_bytes=usable_bytes(slots.device),
            max_trials=slots.num_slots,
            overhead=sharing_overhead(loop, slots.device),
            residents=tuple(residents[uuid]),
        )
        for uuid, slots in loop.fleet.slots.items()
    ]


# Starting


def start(loop: Loop, trial: TrialRecord, planned: TrialPlan, placement: Placement) -> bool:
    """Lease the devices, record the attempt, and start it; return False if another program holds a device."""
    plan = capped_at_free_memory(loop, planned.plan, placement)
    leases = None if plan is None else lease_devices(loop, trial, plan, placement)
    if plan is None or leases is None:
        return False
    attempt = loop.records.begin_attempt(
        trial.number, plan=plan, device_uuids=placement.device_uuids, now=loop.runner.now()
    )
    job = job_for(loop, trial, attempt, plan, placement.device_uuids)
    add_attempt(
        loop,
        RunningAttempt(
            job=job,
            leases=leases,
            option=planned.option._replace(num_bytes=plan.booked_bytes),
            ends_at=placement.ends_at,
            speed_correction=planned.speed_correction,
        ),
    )
    forget_plans(loop, trial.number)
    mark_started(loop, trial.number)
    loop.runner.run(job)
    number = f"{plan.data_parallel} x " if plan.data_parallel > 1 else ""
    names = (f"{number}{plan.device_name}",)
    loop.observe(TrialStarted(record=loop.records.trial(trial.number), attempt=attempt, device_names=names))
    return True


def capped_at_free_memory(loop: Loop, plan: ExecutionPlan, placement: Placement) -> ExecutionPlan | None:
    """Return a plan capped at what is free on its devices now, if it needs them to itself.

    If others hold too much of one, report what the trial waits for and return None.
    """
    if not plan.measures_itself:
        return plan
    for uuid in placement.device_uuids:
        device = loop.fleet.slots[uuid].device
        capped = capped_at(plan, device, loop.leases.available_bytes(device))
        if capped is None:
            notify_waiting(loop, loop.leases.holders(device))
            loop.idle.exclude()
            return None
        plan = capped
    return plan


def lease_devices(
    loop: Loop, trial: TrialRecord, plan: ExecutionPlan, placement: Placement
) -> tuple[Lease, ...] | None:
    """Lease what a plan needs on all of its devices; if that fails, report who holds one and return None."""
    leases: list[Lease] = []
    for uuid in placement.device_uuids:
        device = loop.fleet.slots[uuid].device
        lease = loop.leases.acquire(
            device,
            plan.booked_bytes,
            num_threads=plan.num_threads,
            study=loop.run.name,
            trial=trial.number,
            until=placement.ends_at,
        )
        if lease is None:
            for acquired in leases:
                acquired.release()
            if not make_do(loop, uuid, plan):
                notify_waiting(loop, loop.leases.holders(device))
            loop.idle.exclude()
            return None
        leases.append(lease)
    return tuple(leases)


def make_do(loop: Loop, uuid: str, plan: ExecutionPlan) -> bool:
    """Plan for less of a device where waiting would never end, and say so; return whether that is so.

    In a small container what is free before a study starts is less once its own processes run; nobody else
    can give that back.
    """
    device = loop.fleet.slots[uuid].device
    if loop.attempts.running or loop.leases.are_held(device):
        return False
    most = loop.leases.most_bytes(device)
    if plan.booked_bytes <= most or usable_bytes(device) <= most:
        return False
    message = (
        f"{device.name} has {gib(device.total_bytes)}, of which autosft itself takes "
        f"{gib(device.total_bytes - most)}: trials are planned with what that leaves."
    )
    loop.observe(Note(message=message))
    shrink(loop, uuid, most)
    return True


def job_for(
    loop: Loop, trial: TrialRecord, attempt: int, plan: ExecutionPlan, device_uuids: tuple[str, ...]
) -> TrialJob:
    """Return the job that a worker needs for an attempt."""
    run = loop.run
    return TrialJob(
        study=run.name,
        trial=trial.number,
        attempt=attempt,
        model=run.model,
        data_dir=run.data_dir,
        output_dir=str(trial_dir(run.output_dir, trial.number)),
        settings=trial.settings,
        pinned=pinned_for(run.pinned, plan),
        plan=plan,
        device_uuids=device_uuids,
        resume_from=resume_point(loop.records, trial.number),
        save_resume_state=True,
        trust_remote_code=run.trust_remote_code,
        scoring=race_against_best(run.scoring, loop.records.trials(), run.output_dir),
        report_to=run.report_to,
        store_url=None if run.store_url is None else trial_url(run.store_url, trial.number),
    )


def preload_next(loop: Loop) -> None:
    """Have every node with running trials preload for one more, once its own have started.

    Which trial comes next is decided when a device is free, with all results; what the trials of a study load
    is the same for all, except for those that resume from a checkpoint.
    """
    running = loop.attempts.running.values()
    if loop.shutdown.has_begun or loop.user.is_paused:
        return
    if not running or any(attempt.first_report is None for attempt in running):
        return
    if not (may_ask(loop) or waiting_trials(loop)):
        return
    for attempt in running:
        if attempt.job.plan.data_parallel == 1:
            loop.runner.prepare(replace(attempt.job, resume_from=None))
