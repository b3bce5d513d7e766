"""Ask, plan, place, run: which trial comes next, and how it gets its devices."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

from autosft.profiles.hardware.device import DeviceKind, usable_bytes
from autosft.scheduler.company import keep_company, overhead_of
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.oom_fallbacks import changes_in_words, steps_down
from autosft.scheduler.decide.placement import (
    DeviceState,
    Option,
    Placement,
    Request,
    Resident,
    cluster_s,
    place,
)
from autosft.scheduler.decide.pruning import expected_cost, promotions
from autosft.scheduler.disk import why_no_room
from autosft.scheduler.events import Note, TrialEnded, TrialStarted, Waiting
from autosft.scheduler.outcome import ran_out_of_memory
from autosft.scheduler.prompt_scoring import against_best
from autosft.scheduler.study_run import Kind, Lease, Loop, Running, Way
from autosft.studies.checkpoints import trial_dir, trial_url
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import ExecutionPlan, TrialJob, TrialRecord, TrialState

#: How often a run that waits for others says so.
WAIT_NOTICE_S = 60.0
#: Several devices have to make a trial so much faster to be better than standing idle.
WORTHWHILE_GANG = 1.3
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


# How they would run


def ways_to_run(loop: Loop, trial: TrialRecord) -> tuple[Way, ...]:
    """Return how a trial would run on the devices that are there, with what is left of it.

    None where it fits none of them: it waits for those that have left, or is infeasible.
    """
    below_bytes = trial.plan.estimate.need.median_bytes if ran_out_of_memory(trial) and trial.plan else None
    widest = widest_gang(loop)
    because = (tuple(sorted(loop.kinds)), below_bytes, tuple(widest.items()))
    known = loop.ways.get(trial.number)
    if known is None or known[0] != because:
        try:
            known = because, tuple(plan_trial(loop, trial, below_bytes, widest))
        except planner.DoesNotFitError as error:
            if is_a_device_gone(loop):
                message = f"trial {trial.number} fits no device that is there now. {error.message}"
                tell_waiting(loop, f"Waiting for a device to come back: {message}")
            elif not step_down(loop, trial, below_bytes, widest):
                give_up(loop, trial, error)
            return ()
        loop.ways[trial.number] = known
        loop.latest_options = tuple(one.option for one in known[1]) or loop.latest_options
    if not known[1]:
        tell_waiting(loop, "Waiting: there is no device.")
    left = 1.0
    if trial.measurements:
        left -= trial.measurements[-1].step / max(1, trial.measurements[-1].num_steps)
    return tuple(corrected(one, speed_ratio(loop, one.plan.device_name), left) for one in known[1])


def speed_ratio(loop: Loop, device_name: str) -> float:
    """Return how fast trials of this study ran on a sort of device, over what was predicted."""
    measured = loop.speed_ratios.get(device_name)
    return statistics.median(measured) if measured else 1.0


def step_down(loop: Loop, trial: TrialRecord, below_bytes: int | None, widest: dict[str, int]) -> bool:
    """Give a trial that fits nowhere any more the mildest settings that do; False where there are none.

    Only after it has run out of memory, or with the user's consent, and before anything was measured or
    saved that other settings could not go on from.  The change is recorded with the trial.
    """
    has_begun = bool(trial.measurements) or resume_point(loop.records, trial.number) is not None
    if has_begun or (below_bytes is None and not loop.run.allow_degrade):
        return False
    is_gpu = any(kind.slots.device.kind is DeviceKind.CUDA for kind in loop.kinds.values())
    for step in steps_down(
        trial.settings,
        has_bitsandbytes=is_gpu and find_spec("bitsandbytes") is not None,
        allow_degrade=loop.run.allow_degrade,
    ):
        changed = replace(trial, settings=step.settings)
        try:
            next(iter(plan_trial(loop, changed, below_bytes, widest)), None)
        except planner.DoesNotFitError:
            continue
        words = changes_in_words(trial.settings, step.settings)
        loop.records.change_settings(
            trial.number, step.settings, message=f"out of memory: went on with {words}", now=loop.runner.now()
        )
        same = "" if step.changes_experiment else ", which learns the same"
        loop.observe(Note(message=f"Trial {trial.number} does not fit: it goes on with {words}{same}."))
        return True
    return False


def widest_gang(loop: Loop) -> dict[str, int]:
    """Return how many devices of each kind a trial may take though one would do: several for the last few."""
    num_left = max(1, loop.run.num_trials - loop.records.num_finished())
    return {name: max(1, kind.num_devices // num_left) for name, kind in sorted(loop.kinds.items())}


def plan_trial(
    loop: Loop, trial: TrialRecord, below_bytes: int | None, widest: dict[str, int]
) -> Iterator[Way]:
    """Plan a trial for every kind of device; raises DoesNotFitError where it fits none of them.

    On one device with a fair share of it, with the whole of it if it has to be, else on as few as it takes.
    Where devices would stand idle, also on several.
    """
    refused: planner.DoesNotFitError | None = None
    has_fitted = False
    for name, kind in sorted(loop.kinds.items()):
        usable = usable_bytes(kind.slots.device)
        batch = trial.settings.effective_batch_size
        sizes = planner.gang_sizes(batch, kind.largest_gang(loop.run.max_devices_per_trial))
        tries = [(1, usable // kind.slots.num_slots), (1, usable), *((size, usable) for size in sizes)]
        fitting: list[Way] = []
        for num_devices, budget_bytes in dict.fromkeys(tries):
            if fitting and (num_devices == 1 or num_devices > widest[name]):
                continue
            try:
                plan = plan_on(loop, trial, kind, num_devices, budget_bytes, below_bytes)
            except planner.DoesNotFitError as error:
                refused = error
                continue
            speed_up = plan.predicted_tokens_per_s / fitting[0].plan.predicted_tokens_per_s if fitting else 0
            if not fitting or speed_up >= WORTHWHILE_GANG:
                fitting.append(Way(plan=plan, option=option_for(name, kind, plan)))
        has_fitted = has_fitted or bool(fitting)
        yield from fitting
    if refused is not None and not has_fitted:
        raise refused


def plan_on(
    loop: Loop, trial: TrialRecord, kind: Kind, num_devices: int, budget_bytes: int, below_bytes: int | None
) -> ExecutionPlan:
    return planner.plan(
        trial.settings,
        loop.run.pinned,
        device=kind.slots.device,
        budget_bytes=budget_bytes,
        num_threads=kind.slots.num_threads,
        estimate=loop.run.estimate,
        speed=loop.run.speed,
        below_bytes=below_bytes,
        num_devices=num_devices,
    )


def option_for(name: str, kind: Kind, plan: ExecutionPlan) -> Option:
    device = kind.slots.device
    on_cpu = device.kind is DeviceKind.CPU
    return Option(
        kind=name,
        num_devices=plan.data_parallel,
        num_bytes=plan.estimate.total_bytes,
        load=min(1.0, plan.num_threads / max(1, device.num_cores)) if on_cpu else plan.device_share,
        run_s=plan.predicted_duration_s,
    )


def corrected(way: Way, ratio: float, share_left: float) -> Way:
    """Correct the predicted duration by what trials of this study have measured, and by what is left."""
    run_time = None if way.plan.run_time is None else way.plan.run_time.at_speed(ratio)
    plan = replace(
        way.plan,
        predicted_tokens_per_s=way.plan.predicted_tokens_per_s * ratio,
        predicted_duration_s=way.plan.predicted_duration_s / ratio if run_time is None else run_time.total_s,
        run_time=run_time,
        speed_correction=way.plan.speed_correction * ratio,
    )
    run_s = plan.predicted_duration_s * max(0.0, share_left)
    return Way(plan=plan, option=replace(way.option, run_s=run_s), correction=ratio)


def is_a_device_gone(loop: Loop) -> bool:
    return any(slots is not None and uuid not in loop.slots for uuid, slots in loop.seen.items())


def device_states(loop: Loop) -> list[DeviceState]:
    """Return every device with the running trials that it was promised to."""
    residents: dict[str, list[Resident]] = {uuid: [] for uuid in loop.slots}
    for _, running in sorted(loop.running.items()):
        resident = Resident(
            num_bytes=running.option.num_bytes,
            load=running.option.load,
            ends_at=running.ends_at,
            is_gang=running.option.num_devices > 1,
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
    run, now, plan = loop.run, loop.runner.now(), way.plan
    leases: list[Lease] = []
    for uuid in placement.device_uuids:
        device = loop.slots[uuid].device
        lease = loop.leases.acquire(
            device,
            plan.estimate.total_bytes,
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
        pinned=run.pinned,
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
        option=way.option,
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


def tell_waiting(loop: Loop, message: str) -> None:
    """Say what is waited for, now and then."""
    now = loop.runner.now()
    if now - loop.last_wait >= WAIT_NOTICE_S:
        loop.observe(Waiting(message=message))
        loop.last_wait = now


def resume_point(records: StudyRecords, trial: int) -> str | None:
    """Return the last checkpoint that a trial can go on from."""
    ours = [one for one in records.checkpoints() if one.trial == trial and one.has_resume_state]
    return max(ours, key=lambda one: one.step).path if ours else None


def give_up(loop: Loop, trial: TrialRecord, error: planner.DoesNotFitError) -> None:
    """Record that no plan is left for a trial."""
    loop.records.set_state(trial.number, TrialState.INFEASIBLE, message=str(error), now=loop.runner.now())
    loop.observe(TrialEnded(record=loop.records.trial(trial.number)))
