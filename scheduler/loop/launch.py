"""Ask, plan, place, run: which trial comes next, and how it gets its devices."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from autosft.profiles.hardware.device import usable_bytes
from autosft.scheduler.decide.history import pinned_for
from autosft.scheduler.decide.placement import (
    DeviceState,
    Placement,
    Request,
    Resident,
    cluster_s,
    place,
)
from autosft.scheduler.decide.pruning import expected_cost, promotions
from autosft.scheduler.decide.self_measuring import capped_at
from autosft.scheduler.events import TrialStarted
from autosft.scheduler.loop.colocation import keep_company, overhead_of
from autosft.scheduler.loop.disk import why_no_room
from autosft.scheduler.loop.plan_trial import (
    resume_point,
    tell_waiting,
    ways_to_run,
)
from autosft.scheduler.loop.prompt_race import against_best
from autosft.scheduler.loop.state import Loop, Running, Way
from autosft.scheduler.study_run import Lease
from autosft.studies.files.checkpoints import trial_dir, trial_url
from autosft.studies.trial import ExecutionPlan, TrialJob, TrialRecord, TrialState

#: The place in line of a trial that nobody has asked for yet: behind all others.
LAST = 1 << 30


def start_trials(loop: Loop) -> bool:
    """Start as many trials as there is room for; say whether one is waiting for room."""
    while not loop.is_leaving and not loop.is_paused:
        trials = {one.number: one for one in waiting_trials(loop)}
        if loop.run.max_concurrent is not None and len(loop.running) >= loop.run.max_concurrent:
            return bool(trials)
        ways = {number: found for number, trial in trials.items() if (found := ways_to_run(loop, trial))}
        requests = [request_for(loop, trials[number], found) for number, found in ways.items()]
        devices = device_states(loop)
        now = loop.runner.now()
        placement = place(requests, devices, now=now, work_ends_at=work_ends_at(loop, requests, devices, now))
        if (trials or may_ask(loop)) and (why := why_no_room(loop)) is not None:
            tell_waiting(loop, why)
            loop.idle.excuse()
            return True
        if placement is not None:
            way = ways[placement.trial][placement.option]
            if not start(loop, trials[placement.trial], way, placement):
                return True
        elif may_ask(loop) and has_room_for_another(loop, requests, devices):
            loop.records.ask(now=now)
        else:
            waiting = waiting_trials(loop)
            if not loop.slots and may_ask(loop):
                tell_waiting(loop, "Waiting: there is no device.")
                return True
            if not waiting:
                loop.idle.excuse()
            return bool(waiting)
    return False


# Which trials


def waiting_trials(loop: Loop) -> list[TrialRecord]:
    """Return the trials that want devices: those that wait, and those that have earned their next rung."""
    unfinished = [
        one
        for one in loop.records.unfinished()
        if one.number not in loop.running and one.number not in loop.held
    ]
    paused = {one.number for one in unfinished if one.state is TrialState.PAUSED}
    promoted = (
        promotions(
            loop.rungs,
            paused,
            rule=loop.run.rule,
            minimize=loop.run.minimize,
            is_last_call=not may_ask(loop),
        )
        if paused
        else ()
    )
    return [one for one in unfinished if one.state is TrialState.WAITING or one.number in promoted]


def may_ask(loop: Loop) -> bool:
    """Whether the study shall have a further trial, and it is expected to end before the deadline."""
    num_open = len(loop.records.unfinished())
    if loop.records.num_finished() + num_open >= loop.run.num_trials:
        return False
    if loop.run.deadline is None:
        return True
    run_s = statistics.median(loop.durations_s) if loop.durations_s else 0.0
    return loop.runner.now() + run_s * expected_cost(loop.run.rule) < loop.run.deadline


def has_room_for_another(loop: Loop, requests: Sequence[Request], devices: Sequence[DeviceState]) -> bool:
    """Whether a new trial could start at once, needing what the one planned last needs.

    Asked for only then: a trial that has to wait was chosen knowing less than it might.
    """
    options = tuple(one for one in loop.latest_options if one.kind in loop.kinds)
    if not options or not (requests or loop.running):
        return not requests and any(not one.residents for one in devices)
    now = loop.runner.now()
    another = Request(trial=LAST, options=options, priority=LAST)
    ends_at = work_ends_at(loop, requests, devices, now)
    found = place([*requests, another], devices, now=now, work_ends_at=ends_at)
    return found is not None and found.trial == LAST


def work_ends_at(
    loop: Loop, requests: Sequence[Request], devices: Sequence[DeviceState], now: float
) -> float:
    """Return when all that runs, waits and is still to be asked for would end, spread evenly over devices."""
    num_by_kind = {name: kind.num_devices for name, kind in loop.kinds.items()}
    num_open = len(loop.records.unfinished())
    num_to_come = max(0, loop.run.num_trials - loop.records.num_finished() - num_open)
    waiting_s = sum(cluster_s(one.options, num_by_kind) for one in requests)
    waiting_s += num_to_come * cluster_s(loop.latest_options, num_by_kind)
    left_s = [max((one.ends_at - now for one in state.residents), default=0.0) for state in devices]
    return now + waiting_s + sum(left_s) / max(1, len(left_s))


def request_for(loop: Loop, trial: TrialRecord, ways: Sequence[Way]) -> Request:
    """Ask for devices: first what a user wants or the gain is measured against, then what has begun."""
    if trial.number in loop.first_in_line or trial.origin in ("default", "enqueued"):
        priority = 0
    else:
        priority = 1 if trial.num_attempts else 2
    return Request(trial=trial.number, options=tuple(one.option for one in ways), priority=priority)


# Where they would run


def device_states(loop: Loop) -> list[DeviceState]:
    """Return every device with the running trials that it was promised to."""
    residents: dict[str, list[Resident]] = {uuid: [] for uuid in loop.slots}
    for _, running in sorted(loop.running.items()):
        resident = Resident(
            num_bytes=running.option.num_bytes,
            load=running.option.load,
            ends_at=running.ends_at,
            is_alone=running.option.num_devices > 1 or running.option.is_alone,
        )
        for uuid in running.job.device_uuids:
            if uuid in residents:  # it may have left
                residents[uuid].append(resident)
    return [
        DeviceState(
            device=slots.device,
            kind=loop.kind_of[uuid],
            usable_bytes=usable_bytes(slots.device),
            max_trials=slots.num_slots,
            overhead=overhead_of(loop, slots.device),
            residents=tuple(residents[uuid]),
        )
        for uuid, slots in loop.slots.items()
    ]


# Starting


def start(loop: Loop, trial: TrialRecord, way: Way, placement: Placement) -> bool:
    """Lease the devices, write the attempt down, and run it; False when another program holds one of them."""
    run, now = loop.run, loop.runner.now()
    plan = as_free_now(loop, way.plan, placement)
    if plan is None:
        return False
    leases: list[Lease] = []
    for uuid in placement.device_uuids:
        device = loop.slots[uuid].device
        lease = loop.leases.acquire(
            device,
            plan.booked_bytes,
            num_threads=plan.num_threads,
            study=run.name,
            trial=trial.number,
            until=placement.ends_at,
        )
        if lease is None:  # all of a gang or none
            for one in leases:
                one.release()
            tell_waiting(loop, loop.leases.holders(device))
            loop.idle.excuse()
            return False
        leases.append(lease)
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
        pinned=pinned_for(run.pinned, plan),
        plan=plan,
        device_uuids=placement.device_uuids,
        resume_from=resume_point(loop.records, trial.number),
        save_resume_state=True,
        trust_remote_code=run.trust_remote_code,
        scoring=against_best(run.scoring, loop.records.trials(), run.output_dir),
        report_to=run.report_to,
        store_url=None if run.store_url is None else trial_url(run.store_url, trial.number),
    )
    keep_company(loop, placement.device_uuids)
    loop.running[trial.number] = Running(
        job=job,
        leases=tuple(leases),
        option=replace(way.option, num_bytes=plan.booked_bytes),
        ends_at=placement.ends_at,
        correction=way.correction,
        company_since=now,
    )
    loop.ways.pop(trial.number, None)
    loop.first_in_line.discard(trial.number)
    loop.idle.taken((trial.number, attempt), placement.device_uuids)
    loop.runner.run(job)
    number = f"{plan.data_parallel} x " if plan.data_parallel > 1 else ""
    names = (f"{number}{plan.device_name}",)
    loop.observe(TrialStarted(record=loop.records.trial(trial.number), attempt=attempt, device_names=names))
    return True


def as_free_now(loop: Loop, plan: ExecutionPlan, placement: Placement) -> ExecutionPlan | None:
    """Return a plan under a cap of what is free on its devices now, where it takes them whole.

    None, after saying what is waited for, where others hold too much of one.
    """
    if not plan.measures_itself:
        return plan
    for uuid in placement.device_uuids:
        device = loop.slots[uuid].device
        free = capped_at(plan, device, loop.leases.available_bytes(device))
        if free is None:
            tell_waiting(loop, loop.leases.holders(device))
            loop.idle.excuse()
            return None
        plan = free
    return plan


def prepare_next(loop: Loop) -> None:
    """Have every node where trials run load ahead for one more, once theirs are under way.

    Which trial that will be is decided when a device is free, knowing all results: what trials of a study
    start with is the same for all but those that go on from a checkpoint.
    """
    if loop.is_leaving or loop.is_paused or any(one.first is None for one in loop.running.values()):
        return
    if not loop.running or not (may_ask(loop) or waiting_trials(loop)):
        return
    for running in loop.running.values():
        if running.job.plan.data_parallel == 1 and not running.job.plan.measures_itself:
            loop.runner.prepare(replace(running.job, resume_from=None))
