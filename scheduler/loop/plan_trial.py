"""How a trial would run on the available devices.  Writes `Loop.plans`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec

from autosft.profiles.hardware.device import usable_bytes
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.occupancy import Option
from autosft.scheduler.decide.oom_fallbacks import describe_changes, steps_down
from autosft.scheduler.decide.self_measuring import Measuring, plan_or_measure
from autosft.scheduler.events import Note, TrialEnded
from autosft.scheduler.loop.colocation import speed_ratio
from autosft.scheduler.loop.fleet import is_device_missing
from autosft.scheduler.loop.state import DeviceGroup, Loop, TrialPlan
from autosft.scheduler.loop.transitions import evaluation_batch, ran_out_of_memory
from autosft.scheduler.loop.waiting import notify_waiting
from autosft.studies.files.checkpoints import is_gone
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import ExecutionPlan, TrialRecord, TrialState

#: Minimum speed-up by a gang that justifies using otherwise idle devices.
WORTHWHILE_GANG = 1.3


def plans_for(loop: Loop, trial: TrialRecord) -> tuple[TrialPlan, ...]:
    """Return the plans of a trial on the available devices, for what is left of it.

    Empty if it fits none of them: then it waits for missing devices, continues with settings that need less,
    or is recorded as infeasible.
    """
    cache, widest = loop.plans, widest_gangs(loop)
    key = (tuple(sorted(loop.fleet.groups)), loop.observed.memory, tuple(widest.items()))
    cached = cache.by_trial.get(trial.number)
    if cached is None or cached[0] != key:
        try:
            cached = key, tuple(plan_on_fleet(loop, trial, widest))
        except planner.DoesNotFitError as error:
            if is_device_missing(loop):
                message = f"trial {trial.number} fits no available device. {error.message}"
                notify_waiting(loop, f"Waiting for a device to come back: {message}")
            elif not reduce_settings(loop, trial, widest):
                mark_infeasible(loop, trial, error)
            return ()
        cache.by_trial[trial.number] = cached
        cache.latest_options = tuple(plan.option for plan in cached[1]) or cache.latest_options
    if not cached[1]:
        notify_waiting(loop, "Waiting: no device is available.")
    share_left = 1.0
    if trial.measurements:
        share_left -= trial.measurements[-1].step / max(1, trial.measurements[-1].num_steps)
    return tuple(
        corrected(plan, speed_ratio(loop, plan.plan.device_name), share_left=share_left) for plan in cached[1]
    )


def forget_plans(loop: Loop, trial: int) -> None:
    """Drop the plans of a trial that has started."""
    loop.plans.by_trial.pop(trial, None)


def widest_gangs(loop: Loop) -> dict[str, int]:
    """Return how many devices of each group a trial may use although one would do.

    More than one only for the last trials of a study, if there are more devices than trials.
    """
    num_left = max(1, loop.run.num_trials - loop.records.num_finished())
    return {name: max(1, group.num_devices // num_left) for name, group in sorted(loop.fleet.groups.items())}


def plan_on_fleet(loop: Loop, trial: TrialRecord, widest: Mapping[str, int]) -> Iterator[TrialPlan]:
    """Plan a trial for every group of devices.  Raises DoesNotFitError if it fits none of them.

    Tries a fair share of one device, then the entire device, then as few devices as necessary; also several
    devices that would otherwise be idle.  If nothing bounds its memory, the trial measures itself: in the
    groups that it is guessed to fit or, if there are none, in any.
    """
    try:
        yield from plan_on_groups(loop, trial, widest, Measuring.LIKELY)
    except planner.DoesNotFitError:
        yield from plan_on_groups(loop, trial, widest, Measuring.ANYWAY)


def plan_on_groups(
    loop: Loop, trial: TrialRecord, widest: Mapping[str, int], measuring: Measuring
) -> Iterator[TrialPlan]:
    """Plan a trial for every group of devices that it fits.  Raises DoesNotFitError if there is none."""
    refused: planner.DoesNotFitError | None = None
    has_fitted = False
    for name, group in sorted(loop.fleet.groups.items()):
        fitting: list[TrialPlan] = []
        for room in rooms_to_try(loop, trial, group):
            if fitting and (room.num_devices == 1 or room.num_devices > widest[name]):
                continue
            is_whole = room.budget_bytes == usable_bytes(group.slots.device)
            try:
                plan = plan_within(loop, trial, room, measuring if is_whole else Measuring.NEVER)
            except planner.DoesNotFitError as error:
                refused = error
                continue
            speed_up = plan.predicted_tokens_per_s / fitting[0].plan.predicted_tokens_per_s if fitting else 0
            if not fitting or speed_up >= WORTHWHILE_GANG:
                fitting.append(TrialPlan(plan=plan, option=placement_option(name, group, plan)))
        has_fitted = has_fitted or bool(fitting)
        yield from fitting
    if refused is not None and not has_fitted:
        raise refused


def rooms_to_try(loop: Loop, trial: TrialRecord, group: DeviceGroup) -> list[planner.Room]:
    """Return what a trial could get of a group: a share of a device, an entire device, then gangs."""
    slots, usable = group.slots, usable_bytes(group.slots.device)
    gangs = planner.gang_sizes(
        trial.settings.effective_batch_size, group.largest_gang(loop.run.max_devices_per_trial)
    )
    sizes = dict.fromkeys([(1, usable // slots.num_slots), (1, usable), *((size, usable) for size in gangs)])
    return [
        planner.Room(
            device=slots.device,
            budget_bytes=budget_bytes,
            num_threads=slots.num_threads,
            num_devices=num_devices,
        )
        for num_devices, budget_bytes in sizes
    ]


def plan_within(loop: Loop, trial: TrialRecord, room: planner.Room, measuring: Measuring) -> ExecutionPlan:
    """Plan a trial within `room`, using the memory that trials of the study have measured so far."""
    run = loop.run
    eval_micro_batch = evaluation_batch(run.pinned.eval_micro_batch, loop.records.trials())
    pinned = replace(run.pinned, eval_micro_batch=eval_micro_batch)
    costs = planner.Costs(memory=run.estimate, speed=run.speed, measured=loop.observed.memory)
    plan = plan_or_measure(trial.settings, pinned, room, costs, measuring)
    if eval_micro_batch == run.pinned.eval_micro_batch:
        return plan
    return replace(plan, eval_micro_batch=eval_micro_batch)


def placement_option(name: str, group: DeviceGroup, plan: ExecutionPlan) -> Option:
    """Return what a plan requests from the placement."""
    device = group.slots.device
    has_own_cores = device.kind.traits.is_split_by_cores
    share_of_cores = min(1.0, plan.num_threads / max(1, device.num_cores))
    return Option(
        kind=name,
        num_devices=plan.data_parallel,
        num_bytes=plan.booked_bytes,
        load=share_of_cores if has_own_cores else plan.device_share,
        run_s=plan.predicted_duration_s,
        is_alone=plan.measures_itself,
    )


def corrected(planned: TrialPlan, ratio: float, *, share_left: float) -> TrialPlan:
    """Correct a predicted duration by the speed measured in this study, and by the work that is left."""
    before = planned.plan
    run_time = None if before.run_time is None else before.run_time.at_speed(ratio)
    plan = replace(
        before,
        predicted_tokens_per_s=before.predicted_tokens_per_s * ratio,
        predicted_duration_s=before.predicted_duration_s / ratio if run_time is None else run_time.total_s,
        run_time=run_time,
        speed_correction=before.speed_correction * ratio,
    )
    run_s = plan.predicted_duration_s * max(0.0, share_left)
    return TrialPlan(plan=plan, option=planned.option._replace(run_s=run_s), speed_correction=ratio)


# If no plan fits


def reduce_settings(loop: Loop, trial: TrialRecord, widest: Mapping[str, int]) -> bool:
    """Give a trial that no longer fits the mildest settings that do; return False if there are none.

    Only after it ran out of memory, or with the user's consent, and before anything was measured or saved
    that other settings could not resume from.  The change is recorded with the trial.
    """
    has_begun = bool(trial.measurements) or resume_point(loop.records, trial.number) is not None
    if has_begun or not (ran_out_of_memory(trial) or loop.run.allow_degrade):
        return False
    kinds = {group.slots.device.kind for group in loop.fleet.groups.values()}
    can_use_bitsandbytes = any(kind.traits.has_bitsandbytes for kind in kinds)
    for step in steps_down(
        trial.settings,
        has_bitsandbytes=can_use_bitsandbytes and find_spec("bitsandbytes") is not None,
        allow_degrade=loop.run.allow_degrade,
    ):
        changed = replace(trial, settings=step.settings)
        try:
            next(iter(plan_on_fleet(loop, changed, widest)), None)
        except planner.DoesNotFitError:
            continue
        changes = describe_changes(trial.settings, step.settings)
        message = f"out of memory: continued with {changes}"
        loop.records.change_settings(trial.number, step.settings, message=message, now=loop.runner.now())
        same = "" if step.changes_experiment else ", which does not change what it learns"
        loop.observe(Note(message=f"Trial {trial.number} does not fit: it continues with {changes}{same}."))
        return True
    return False


def mark_infeasible(loop: Loop, trial: TrialRecord, error: planner.DoesNotFitError) -> None:
    """Record that no plan is left for a trial."""
    loop.records.set_state(trial.number, TrialState.INFEASIBLE, message=str(error), now=loop.runner.now())
    loop.observe(TrialEnded(record=loop.records.trial(trial.number)))


def resume_point(records: StudyRecords, trial: int) -> str | None:
    """Return the last checkpoint that a trial can be resumed from; one that was here and is gone is none."""
    resumable = [
        checkpoint
        for checkpoint in records.checkpoints()
        if checkpoint.trial == trial and checkpoint.has_resume_state and not is_gone(checkpoint)
    ]
    return max(resumable, key=lambda checkpoint: checkpoint.step).path if resumable else None
