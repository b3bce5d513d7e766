"""The loop: ask, plan, place, run, judge, tell, learn.

Everything that decides is a plain function elsewhere (`planner`, `placement`, `pruning`, `outcome`);
everything that acts is behind a seam (`records` for the database, `runner` for processes and devices,
`leases` for what other programs hold, `devices` for what is there).  This module only says in which order.
"""

from __future__ import annotations

from collections.abc import Callable

from autosft.profiles.errors import StudyFailedError, UserError
from autosft.profiles.hardware.device import ClusterProfile, usable_bytes
from autosft.scheduler.decide.sharing import MIN_MEASURED, measured_overhead
from autosft.scheduler.events import Note, Observer
from autosft.scheduler.loop.fleet import look_at_devices
from autosft.scheduler.loop.launch import prepare_next, start_trials
from autosft.scheduler.loop.plan_trial import tell_waiting
from autosft.scheduler.loop.results import close_paused, ended, measured, remember, stop
from autosft.scheduler.loop.state import Loop
from autosft.scheduler.loop.user_commands import drop_stale, obey
from autosft.scheduler.study_run import DeviceSource, LeaseBroker, Slots, StaticDevices, StudyRun, Tally
from autosft.studies.results.summary import best_trial
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import Measurement, StopReason, TrialState
from autosft.workers.runner import TrialRunner

#: How long one wait for events lasts: the latency of Ctrl+C and of the heartbeat.
POLL_S = 0.5


def run_study(
    run: StudyRun,
    *,
    records: StudyRecords,
    runner: TrialRunner,
    leases: LeaseBroker,
    observe: Observer,
    stop_requested: Callable[[], bool],
    devices: DeviceSource | None = None,
) -> Tally:
    """Run trials until the study has as many finished ones as were asked for, or its time is over.

    Trials that an earlier run left unfinished are taken up first.  `devices` says what is there (the run's
    own, where it is not given).  `stop_requested` turns true when the user wants to leave: running trials
    save a checkpoint and stay unfinished.  Trials that the user has paused stay paused; all others are
    finished at the end.  Raises StudyFailedError when trials keep failing and UserError when nothing that
    was asked for can fit.
    """
    loop = Loop(
        run=run,
        records=records,
        runner=runner,
        leases=leases,
        source=devices or StaticDevices(cluster_of(run)),
        observe=observe,
        stop_requested=stop_requested,
        seen={one.device.uuid: one for one in run.slots},
        measured=run.measured,
    )
    records.recover(now=runner.now())
    records.project_later()
    records.tidy_checkpoints(run.output_dir, keep_best=run.keep_best)
    remember(loop, records.trials())
    drop_stale(loop)
    while True:
        obey(loop)
        leave_if_asked(loop)
        look_at_devices(loop)
        is_waiting = start_trials(loop)
        if not loop.running and not is_waiting and not (loop.is_paused and not loop.is_leaving):
            if obey(loop, at_once=True):
                continue  # a last wish may have given it work again
            break
        if loop.is_paused:
            tell_waiting(loop, f"Paused. To go on: autosft studies resume {run.name}")
        prepare_next(loop)
        records.project(now=runner.now())  # once the devices have work
        for event in runner.events(POLL_S):
            if isinstance(event, Measurement):
                measured(loop, event)
            else:
                ended(loop, event)
        records.heartbeat(now=runner.now())
    if not loop.is_leaving or is_time_over(loop) or loop.reached_target is not None:
        close_paused(loop)
        tell_target_missed(loop)
    drop_stale(loop)
    records.project(now=runner.now(), at_once=True)
    refuse_if_nothing_fits(loop)
    return tally(loop)


def cluster_of(run: StudyRun) -> ClusterProfile:
    devices = tuple(one.device for one in run.slots)
    return ClusterProfile(devices=devices, driver_version=None, cuda_version=None)


# Leaving


def leave_if_asked(loop: Loop) -> None:
    """On the user's wish or at the deadline, ask every running trial to end and start no other."""
    if loop.is_leaving:
        return
    if loop.stop_requested() or loop.was_stopped:
        reason = StopReason.SHUTDOWN
        loop.observe(Note(message="Stopping: running trials save a checkpoint and stay unfinished."))
    elif is_time_over(loop):
        reason = StopReason.BUDGET
        loop.observe(Note(message="The time budget is over: running trials end here."))
    elif (reached := loop.reached_target) is not None:
        reason = StopReason.TARGET
        what = f"{loop.run.metric} {reached.metric(loop.run.metric):.4g}"
        where = f"trial {reached.trial} at step {reached.step}"
        loop.observe(
            Note(message=f"The target is reached beyond chance: {what}, {where}. The study ends here.")
        )
    else:
        return
    loop.is_leaving = True
    for running in loop.running.values():
        stop(loop, running, reason)


def tell_target_missed(loop: Loop) -> None:
    """Say of a study that is over that its target is still to be passed."""
    run = loop.run
    if run.target is None or loop.reached_target is not None:
        return
    best = best_trial(loop.records.trials(), maximize=not run.minimize)
    found = f"the best has {run.metric} {best.value:.4g}" if best and best.value is not None else "no result"
    loop.observe(
        Note(
            message=f"The target, {run.metric} {run.target:g}, was not passed beyond chance: {found}. "
            "The same command with a larger --trials or --time-budget searches on."
        )
    )


def refuse_if_nothing_fits(loop: Loop) -> None:
    """Raise UserError where every trial of a study that is over ran out of memory and none has a result."""
    trials = loop.records.trials()
    infeasible = [one for one in trials if one.state is TrialState.INFEASIBLE]
    if not infeasible or len(infeasible) < len(trials) or any(one.value is not None for one in trials):
        return
    raise UserError(
        f"nothing of this study fits: {len(infeasible)} trials were tried and none has a result. "
        f"{infeasible[0].message}"
    )


def is_time_over(loop: Loop) -> bool:
    return loop.run.deadline is not None and loop.runner.now() >= loop.run.deadline


def tally(loop: Loop) -> Tally:
    """Sum up what the run has measured of itself."""
    return Tally(
        num_gaps=len(loop.idle.gaps_s),
        idle_s=sum(loop.idle.gaps_s),
        median_gap_s=loop.idle.median_s(),
        overhead=measured_overhead(1.0, loop.overheads) if len(loop.overheads) >= MIN_MEASURED else None,
        held=tuple(sorted(loop.held)),
        was_stopped=loop.was_stopped,
    )


__all__ = [
    "DeviceSource",
    "LeaseBroker",
    "Slots",
    "StaticDevices",
    "StudyFailedError",
    "StudyRun",
    "Tally",
    "run_study",
    "usable_bytes",
]
