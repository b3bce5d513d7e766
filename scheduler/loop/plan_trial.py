"""How a trial would run on the devices that are there."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

from autosft.profiles.hardware.device import DeviceKind, usable_bytes
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.oom_fallbacks import changes_in_words, steps_down
from autosft.scheduler.decide.placement import Option
from autosft.scheduler.decide.self_measuring import Measuring, plan_or_measure
from autosft.scheduler.events import Note, TrialEnded, Waiting
from autosft.scheduler.loop.state import Kind, Loop, Way
from autosft.scheduler.loop.transitions import evaluation_batch, ran_out_of_memory
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import ExecutionPlan, TrialRecord, TrialState

#: How often a run that waits for others says so.
WAIT_NOTICE_S = 60.0
#: Several devices have to make a trial so much faster to be better than standing idle.
WORTHWHILE_GANG = 1.3


def ways_to_run(loop: Loop, trial: TrialRecord) -> tuple[Way, ...]:
    """Return how a trial would run on the devices that are there, with what is left of it.

    None where it fits none of them: it waits for those that have left, or is infeasible.
    """
    widest = widest_gang(loop)
    because = (tuple(sorted(loop.kinds)), loop.measured, tuple(widest.items()))
    known = loop.ways.get(trial.number)
    if known is None or known[0] != because:
        try:
            known = because, tuple(plan_trial(loop, trial, widest))
        except planner.DoesNotFitError as error:
            if is_a_device_gone(loop):
                message = f"trial {trial.number} fits no device that is there now. {error.message}"
                tell_waiting(loop, f"Waiting for a device to come back: {message}")
            elif not step_down(loop, trial, widest):
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


def step_down(loop: Loop, trial: TrialRecord, widest: dict[str, int]) -> bool:
    """Give a trial that fits nowhere any more the mildest settings that do; False where there are none.

    Only after it has run out of memory, or with the user's consent, and before anything was measured or
    saved that other settings could not go on from.  The change is recorded with the trial.
    """
    has_begun = bool(trial.measurements) or resume_point(loop.records, trial.number) is not None
    if has_begun or not (ran_out_of_memory(trial) or loop.run.allow_degrade):
        return False
    is_gpu = any(kind.slots.device.kind is DeviceKind.CUDA for kind in loop.kinds.values())
    for step in steps_down(
        trial.settings,
        has_bitsandbytes=is_gpu and find_spec("bitsandbytes") is not None,
        allow_degrade=loop.run.allow_degrade,
    ):
        changed = replace(trial, settings=step.settings)
        try:
            next(iter(plan_trial(loop, changed, widest)), None)
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


def plan_trial(loop: Loop, trial: TrialRecord, widest: dict[str, int]) -> Iterator[Way]:
    """Plan a trial for every kind of device; raises DoesNotFitError where it fits none of them.

    On one device with a fair share of it, with the whole of it if it has to be, else on as few as it takes.
    Where devices would stand idle, also on several.  Where nothing bounds its memory it measures itself: on
    the kinds that it is guessed to fit, and where that is none, on any.
    """
    try:
        yield from plan_on_kinds(loop, trial, widest, Measuring.LIKELY)
    except planner.DoesNotFitError:
        yield from plan_on_kinds(loop, trial, widest, Measuring.ANYWAY)


def plan_on_kinds(
    loop: Loop, trial: TrialRecord, widest: dict[str, int], measuring: Measuring
) -> Iterator[Way]:
    """Plan a trial for every kind of device that it fits; raises DoesNotFitError where that is none."""
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
            room = planner.Room(
                device=kind.slots.device,
                budget_bytes=budget_bytes,
                num_threads=kind.slots.num_threads,
                num_devices=num_devices,
            )
            try:
                plan = plan_on(loop, trial, room, measuring if budget_bytes == usable else Measuring.NEVER)
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


def plan_on(loop: Loop, trial: TrialRecord, room: planner.Room, measuring: Measuring) -> ExecutionPlan:
    """Plan a trial within `room`, as trials of the study have measured their memory so far."""
    run = loop.run
    eval_micro_batch = evaluation_batch(run.pinned.eval_micro_batch, loop.records.trials())
    pinned = replace(run.pinned, eval_micro_batch=eval_micro_batch)
    costs = planner.Costs(memory=run.estimate, speed=run.speed, measured=loop.measured)
    made = plan_or_measure(trial.settings, pinned, room, costs, measuring)
    if eval_micro_batch == run.pinned.eval_micro_batch:
        return made
    return replace(made, eval_micro_batch=eval_micro_batch)


def option_for(name: str, kind: Kind, plan: ExecutionPlan) -> Option:
    device = kind.slots.device
    on_cpu = device.kind is DeviceKind.CPU
    return Option(
        kind=name,
        num_devices=plan.data_parallel,
        num_bytes=plan.booked_bytes,
        load=min(1.0, plan.num_threads / max(1, device.num_cores)) if on_cpu else plan.device_share,
        run_s=plan.predicted_duration_s,
        is_alone=plan.measures_itself,
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
