"""What comes after the trials that run is loaded while they run."""

from __future__ import annotations

from dataclasses import replace

from autosft.scheduler.starting import may_ask, waiting_trials
from autosft.scheduler.study_run import Loop


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
        if running.job.plan.data_parallel == 1:
            loop.runner.prepare(replace(running.job, resume_from=None))
