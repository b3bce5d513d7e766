"""Whether a study wants another trial."""

from __future__ import annotations

import statistics

from autosft.scheduler.decide.pruning import expected_cost
from autosft.scheduler.loop.state import Loop


def is_budget_spent(loop: Loop) -> bool:
    """Whether the trials have been trained for as many tokens as --budget-runs allows.

    What runs counts up to its next evaluation.
    """
    return _is_spent(loop, set(loop.attempts.running))


def is_budget_spent_without(loop: Loop, trial: int) -> bool:
    """The same, without the next evaluation of a trial that was just evaluated."""
    return _is_spent(loop, set(loop.attempts.running) - {trial})


def _is_spent(loop: Loop, running: set[int]) -> bool:
    if loop.run.budget_runs is None:
        return False
    evaluations = sum(
        max((step.evaluation or 0 for step in trial.measurements), default=0) + (trial.number in running)
        for trial in loop.records.trials()
    )
    return evaluations / loop.run.rule.num_rungs >= loop.run.budget_runs


def may_ask(loop: Loop) -> bool:
    """Whether the study needs another trial, and it is expected to end before the deadline."""
    if is_budget_spent(loop):
        return False
    num_open = len(loop.records.unfinished())
    if loop.records.num_finished() + num_open >= loop.run.num_trials:
        return False
    if loop.run.deadline is None:
        return True
    durations_s = loop.observed.durations_s
    run_s = statistics.median(durations_s) if durations_s else 0.0
    return loop.runner.now() + run_s * expected_cost(loop.run.rule) < loop.run.deadline
