"""The tuning loop: ask, plan, place, run, judge, learn.  Writes `Loop.shutdown`.

All decisions are pure functions elsewhere (`decide`, `transitions`); all actions are behind interfaces:
`records` (the database), `runner` (processes and devices), `leases` (what other processes hold), `devices`
(what is available).  This module only determines the order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autosft.profiles.errors import StudyFailedError
from autosft.profiles.hardware.device import ClusterProfile
from autosft.scheduler.decide.sharing import MIN_MEASURED, measured_overhead
from autosft.scheduler.events import Note, Observer
from autosft.scheduler.loop.attempts import request_stop
from autosft.scheduler.loop.fleet import initial_fleet, refresh_fleet
from autosft.scheduler.loop.launch import preload_next, start_trials
from autosft.scheduler.loop.results import (
    handle_end,
    handle_measurement,
    initial_observations,
    restore_results,
    stop_unpromoted_trials,
)
from autosft.scheduler.loop.state import Loop
from autosft.scheduler.loop.transitions import may_be_tried_again
from autosft.scheduler.loop.user_commands import discard_study_commands, process_commands
from autosft.scheduler.loop.waiting import notify_waiting
from autosft.scheduler.study_run import DeviceSource, LeaseBroker, StaticDevices, StudyRun, Tally
from autosft.studies.files.checkpoints import is_gone
from autosft.studies.results.summary import best_trial
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import Measurement, StopReason
from autosft.workers.runner import TrialRunner

#: Timeout of a wait for events: the latency of Ctrl+C and of the heartbeat.
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
    """Run trials until the study has the requested number of finished ones, or its time is over.

    Trials that an earlier run left unfinished come first.  `devices` tells which devices are available (by
    default those of `run`).  `stop_requested` turns true when the user wants to stop: running trials save a
    checkpoint and stay unfinished.  Trials that the user has paused stay paused; all others are finished at
    the end.  Raises StudyFailedError if trials keep failing.
    """
    loop = Loop(
        run=run,
        records=records,
        runner=runner,
        leases=leases,
        devices=devices or StaticDevices(planned_cluster(run)),
        observe=observe,
        stop_requested=stop_requested,
        fleet=initial_fleet(run),
        observed=initial_observations(run),
    )
    take_up_records(loop)
    output = identity_of(run.output_dir)
    while True:
        require_same_folder(run.output_dir, output)
        process_commands(loop)
        shut_down_if_due(loop)
        refresh_fleet(loop)
        is_waiting = start_trials(loop)
        is_paused = loop.user.is_paused and not loop.shutdown.has_begun
        if not loop.attempts.running and not is_waiting and not is_paused:
            if process_commands(loop, at_once=True):
                continue  # the last commands may have added work
            break
        if loop.user.is_paused:
            notify_waiting(loop, f"Paused. To resume: autosft studies resume {run.name}")
        preload_next(loop)
        records.project(now=runner.now())  # once the devices have work
        for event in runner.events(POLL_S):
            if isinstance(event, Measurement):
                handle_measurement(loop, event)
            else:
                handle_end(loop, event)
        records.heartbeat(now=runner.now())
    close_study(loop)
    return tally(loop)


def planned_cluster(run: StudyRun) -> ClusterProfile:
    """Return the devices that a study was planned for."""
    devices = tuple(slots.device for slots in run.slots)
    return ClusterProfile(devices=devices, driver_version=None, cuda_version=None)


def take_up_records(loop: Loop) -> None:
    """Restore the state to continue from out of the records of earlier runs."""
    records, run = loop.records, loop.run
    take_up_failed_trials(loop)
    records.recover(now=loop.runner.now())
    records.project_later()
    records.tidy_checkpoints(run.output_dir, keep_best=run.keep_best)
    if gone := [checkpoint for checkpoint in records.checkpoints() if is_gone(checkpoint)]:
        message = f"{len(gone)} checkpoints of this study are gone, such as {gone[0].path}."
        loop.observe(Note(message=f"{message} Trials that would go on from them begin anew."))
    restore_results(loop, records.trials())
    discard_study_commands(loop)


def identity_of(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another one of its name; None where it is not there."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def require_same_folder(folder: Path, before: tuple[int, int] | None) -> None:
    """Raise StudyFailedError where the output folder was moved, deleted or replaced while the study ran.

    Workers would make a new one, and the checkpoints that the records name would not be in it.
    """
    if before is not None and identity_of(folder) != before:
        raise StudyFailedError(
            f"the output folder {folder} was moved, deleted or replaced while the study ran. Put it back, "
            "and run the same command again: nothing that was recorded is lost; without it trials begin anew."
        )


def take_up_failed_trials(loop: Loop) -> None:
    """Have trials wait again that failed for their surroundings, as many as the study still wants.

    The default configuration comes first: the gain of the search is measured against it.
    """
    records = loop.records
    failed = [trial for trial in records.trials() if may_be_tried_again(trial)]
    num_wanted = loop.run.num_trials - records.num_finished() - len(records.unfinished())
    for trial in sorted(failed, key=lambda trial: (not trial.is_default, trial.number))[: max(0, num_wanted)]:
        records.take_up_again(trial.number, now=loop.runner.now())
        loop.observe(Note(message=f"Trial {trial.number} is tried again; it had failed: {trial.message}"))


# Ending


def shut_down_if_due(loop: Loop) -> None:
    """Stop all running trials and start no others, if the user asks, at the deadline or at the target."""
    if loop.shutdown.has_begun:
        return
    if loop.stop_requested() or loop.user.is_stopped:
        reason = StopReason.SHUTDOWN
        message = "Stopping: running trials save a checkpoint and stay unfinished."
    elif is_time_over(loop):
        reason = StopReason.BUDGET
        message = "The time budget is used up: running trials end here."
    elif (reached := loop.observed.reached_target) is not None:
        reason = StopReason.TARGET
        value = f"{loop.run.metric} {reached.metric(loop.run.metric):.4g}"
        where = f"trial {reached.trial} at step {reached.step}"
        message = f"The target is reached with 95 % confidence: {value}, {where}. The study ends here."
    else:
        return
    loop.observe(Note(message=message))
    loop.shutdown.has_begun = True
    for attempt in loop.attempts.running.values():
        request_stop(loop, attempt, reason)


def is_time_over(loop: Loop) -> bool:
    return loop.run.deadline is not None and loop.runner.now() >= loop.run.deadline


def close_study(loop: Loop) -> None:
    """Bring the records of a run that has ended into their final state."""
    is_over = is_time_over(loop) or loop.observed.reached_target is not None
    if not loop.shutdown.has_begun or is_over:
        stop_unpromoted_trials(loop)
        report_missed_target(loop)
    discard_study_commands(loop)
    loop.records.project(now=loop.runner.now(), at_once=True)


def report_missed_target(loop: Loop) -> None:
    """Report that a finished study has not reached its target."""
    run = loop.run
    if run.target is None or loop.observed.reached_target is not None:
        return
    best = best_trial(loop.records.trials(), maximize=not run.minimize)
    found = f"the best has {run.metric} {best.value:.4g}" if best and best.value is not None else "no result"
    message = f"The target, {run.metric} {run.target:g}, was not reached with 95 % confidence: {found}. "
    message += "The same command with a larger --trials or --time-budget continues the search."
    loop.observe(Note(message=message))


def tally(loop: Loop) -> Tally:
    """Summarise what the run measured about itself."""
    overheads = loop.speed.overheads
    return Tally(
        num_gaps=len(loop.idle.gaps_s),
        idle_s=sum(loop.idle.gaps_s),
        median_gap_s=loop.idle.median_s(),
        overhead=measured_overhead(1.0, overheads) if len(overheads) >= MIN_MEASURED else None,
        paused_trials=tuple(sorted(loop.user.paused_trials)),
        was_stopped=loop.user.is_stopped,
    )
