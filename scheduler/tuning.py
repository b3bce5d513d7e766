"""The loop: ask, plan, place, run, judge, tell, learn.

Everything that decides is a plain function elsewhere (`planner`, `placement`, `pruning`); everything that
acts is behind a seam (`records` for the database, `runner` for processes and devices, `leases` for what
other programs hold).  This module only says in which order.
"""

from __future__ import annotations

from collections.abc import Callable

from autosft.scheduler.events import Note, Observer
from autosft.scheduler.judging import best_value, ended, measured
from autosft.scheduler.starting import start_trials
from autosft.scheduler.study_run import (
    LeaseBroker,
    Loop,
    Slots,
    StudyFailedError,
    StudyRun,
    usable_bytes,
)
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import Measurement, StopReason
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


__all__ = ["LeaseBroker", "Slots", "StudyFailedError", "StudyRun", "run_study", "usable_bytes"]
