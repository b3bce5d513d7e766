"""Whether a study wants another trial."""

from __future__ import annotations

import statistics

from autosft.scheduler.decide.pruning import expected_cost
from autosft.scheduler.loop.state import Loop


def may_ask(loop: Loop) -> bool:
    """Whether the study needs another trial, and it is expected to end before the deadline."""
    num_open = len(loop.records.unfinished())
    if loop.records.num_finished() + num_open >= loop.run.num_trials:
        return False
    if loop.run.deadline is None:
        return True
    durations_s = loop.observed.durations_s
    run_s = statistics.median(durations_s) if durations_s else 0.0
    return loop.runner.now() + run_s * expected_cost(loop.run.rule) < loop.run.deadline
