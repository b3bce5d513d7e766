from __future__ import annotations

import pytest

from autosft.profiles.units import duration
from autosft.scheduler.decide.budget import Budget, plan_budget
from autosft.scheduler.decide.pruning import PruningRule


def budget(
    *,
    num_trials: int | None = None,
    hours: float | None = None,
    num_slots: int = 1,
    full_hours: float = 1.0,
    prune: bool = False,
) -> Budget:
    return plan_budget(
        num_trials=num_trials,
        time_budget_s=None if hours is None else hours * 3600,
        num_slots=num_slots,
        full_run_s=full_hours * 3600,
        evaluation_s=60.0,
        rule=PruningRule(),
        prune=prune,
    )


def test_without_anything_asked_there_is_a_default() -> None:
    assert budget().num_trials == 20


def test_a_time_budget_decides_the_number_of_trials() -> None:
    assert budget(hours=6).num_trials == 6
    assert budget(hours=6, num_slots=2).num_trials == 12
    assert budget(hours=6, prune=True).num_trials > 6


def test_a_number_that_was_asked_for_is_kept_and_questioned() -> None:
    planned = budget(num_trials=10, hours=6)
    assert planned.num_trials == 10
    assert any("About 6 of the 10 trials" in line for line in planned.lines)


def test_a_budget_below_one_run_says_so() -> None:
    planned = budget(hours=0.5)
    assert planned.num_trials == 1
    assert any("Not even one full run" in line for line in planned.lines)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.2, "4.2 s"), (45, "45 s"), (720, "12 min"), (12_600, "3.5 h"), (181_440, "2.1 days")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
