"""How long the rest of a run will take, from its first steps."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.profiles.recipe import RunTime
from autosft.workers.training.eta import MIN_STEPS, NUM_RECENT, NUM_WARM_UP, Pace

EXPECTED = RunTime(
    start_s=1.0, training_s=100.0, num_evaluations=2, evaluation_s=10.0, answers_s=30.0, checkpoint_s=4.0
)


def after(
    num_steps: int,
    *,
    tokens: list[int],
    token_s: float = 0.1,
    evaluations: tuple[int, ...] = (),
    expected: RunTime | None = EXPECTED,
) -> Pace:
    """Return the pace after so many steps; the first two, which warm up, take ten times their time."""
    pace = Pace((0, *itertools.accumulate(tokens)), evaluations, expected)
    for step in range(1, num_steps + 1):
        pace.step_took(step, tokens[step - 1] * token_s * (10 if step <= NUM_WARM_UP else 1))
    return pace


def test_there_is_no_estimate_before_there_is_a_pace() -> None:
    first = NUM_WARM_UP + MIN_STEPS
    assert after(first - 1, tokens=[5] * 50).remaining_s(first - 1, is_evaluated=False) is None
    assert after(first, tokens=[5] * 50).remaining_s(first, is_evaluated=False) is not None


@given(st.lists(st.integers(1, 4000), min_size=12, max_size=60), st.data())
def test_steps_count_by_their_padded_tokens(tokens: list[int], data: st.DataObject) -> None:
    done = data.draw(st.integers(NUM_WARM_UP + MIN_STEPS, len(tokens)))
    left = after(done, tokens=tokens).remaining_s(done, is_evaluated=False)
    assert left == pytest.approx(0.1 * sum(tokens[done:]))


def test_a_machine_that_slows_down_is_followed() -> None:
    pace = after(50, tokens=[10] * 500)
    for step in range(51, 51 + NUM_RECENT):
        pace.step_took(step, 3.0)
    assert pace.remaining_s(150, is_evaluated=False) == pytest.approx(3.0 * 350)


def test_what_was_not_seen_is_expected_at_the_pace_of_the_steps() -> None:
    # 1,000 tokens at 0.2 s are 200 s: half the expected speed.  Evaluations and answers take twice as long
    # as expected too, checkpoints are written by the disk.
    pace = after(20, tokens=[10] * 100, token_s=0.2, evaluations=(50, 100))
    assert pace.remaining_s(20, is_evaluated=False) == pytest.approx(160 + 2 * (20 + 60 + 4))


def test_evaluations_cost_what_they_have_cost() -> None:
    pace = after(50, tokens=[10] * 100, evaluations=(50, 100))
    before = pace.remaining_s(50, is_evaluated=False)
    pace.evaluation_took(checkpoint_s=1.0, evaluation_s=7.0, answers_s=0.0)
    assert pace.remaining_s(50, is_evaluated=True) == pytest.approx(50 + 8)
    assert before == pytest.approx(50 + 2 * 44)
    assert pace.remaining_s(100, is_evaluated=True) == 0.0


@pytest.mark.parametrize("expected", [None, replace(EXPECTED, training_s=0.0)])
def test_a_plan_that_expected_nothing_counts_what_was_seen(expected: RunTime | None) -> None:
    pace = after(20, tokens=[10] * 100, evaluations=(10, 100), expected=expected)
    assert pace.remaining_s(20, is_evaluated=False) == pytest.approx(80)
    pace.evaluation_took(checkpoint_s=1.0, evaluation_s=7.0, answers_s=2.0)
    assert pace.remaining_s(20, is_evaluated=False) == pytest.approx(80 + 10)
