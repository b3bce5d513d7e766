from __future__ import annotations

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.units import duration
from autosft.scheduler.decide.budget import Budget, plan_budget, would_fit
from autosft.scheduler.decide.pruning import PruningRule, expected_cost
from autosft.scheduler.decide.remaining import left_s


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
    assert planned.too_short.startswith("Would fit: --epochs 0.45, or --time-budget 1h06m (")
    with pytest.raises(UserError, match="--time-budget 30 min: not even one full run"):
        planned.require_time()
    assert budget(hours=1).too_short == ""
    budget(hours=1).require_time()


@pytest.mark.parametrize(
    ("time_s", "words"),
    [
        (600.0, "Would fit: --epochs 0.9, or --time-budget 22m"),  # 300 of 900 s remain, of 3 epochs
        (310.0, "Would fit: --epochs 0.03, or --time-budget 22m"),
        (200.0, "Would fit: --time-budget 22m"),  # not even the untuned model
    ],
)
def test_what_would_fit_leaves_time_for_the_untuned_model(time_s: float, words: str) -> None:
    assert would_fit(900.0, time_budget_s=time_s, untuned_s=300.0, epochs=3.0).startswith(words)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.2, "4.2 s"), (45, "45 s"), (720, "12 min"), (12_600, "3.5 h"), (181_440, "2.1 days")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_plan_and_the_time_left_are_one_model() -> None:
    """20 trials, two at once, with pruning: what is left as the first starts is what was planned."""
    planned = budget(num_trials=20, num_slots=2, prune=True)
    assert planned.share == pytest.approx(expected_cost(PruningRule()))
    left = left_s([3600.0], num_to_come=19, trial_s=planned.share * 3600.0, num_slots=planned.num_slots)
    assert planned.study_s == pytest.approx(left)


def test_the_untuned_models_time_is_part_of_the_plan() -> None:
    def planned(untuned_s: float) -> Budget:
        return plan_budget(
            num_trials=None,
            time_budget_s=4 * 3600.0,
            num_slots=1,
            full_run_s=3600.0,
            evaluation_s=60.0,
            untuned_s=untuned_s,
            rule=PruningRule(),
            prune=False,
        )

    assert planned(0.0).num_trials == 4
    assert planned(600.0).num_trials == 3
    assert planned(600.0).study_s == pytest.approx(600.0 + 3 * 3600.0)
    assert any("untuned model is scored once" in line and "10 min" in line for line in planned(600.0).lines)


@pytest.mark.parametrize(
    ("running", "num_to_come", "num_slots", "expected"),
    [
        ([10.0], 0, 1, 10.0),
        ([10.0, 2.0], 0, 2, 10.0),
        ([10.0], 9, 1, 55.0),
        ([10.0], 9, 2, 27.5),
        ([], 4, 2, 10.0),
        ([], 4, 0, 20.0),
    ],
)
def test_what_is_left(running: list[float], num_to_come: int, num_slots: int, expected: float) -> None:
    assert left_s(running, num_to_come=num_to_come, trial_s=5.0, num_slots=num_slots) == expected
