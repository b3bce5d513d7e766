from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.profiles.memory.calibration import (
    PRIOR_UPPER_RATIO,
    Calibration,
    CalibrationRow,
    bound_for,
    conformal_upper,
)


def calibration(ratios: list[float], stack: str = "a") -> Calibration:
    return Calibration(
        rows=tuple(
            CalibrationRow(fingerprint=stack, predicted_bytes=10**9, measured_bytes=round(ratio * 10**9))
            for ratio in ratios
        )
    )


def test_without_rows_the_prior_holds() -> None:
    bound = bound_for(None, "a")
    assert (bound.median_ratio, bound.upper_ratio, bound.num_rows) == (1.0, PRIOR_UPPER_RATIO, 0)


def test_a_stack_of_its_own_is_narrower_than_a_borrowed_one() -> None:
    rows = calibration([1.0 + i / 1000 for i in range(30)])
    own, borrowed = bound_for(rows, "a"), bound_for(rows, "b")
    assert not own.is_borrowed
    assert borrowed.is_borrowed
    assert own.upper_ratio < borrowed.upper_ratio
    assert own.num_rows == borrowed.num_rows == 30


def test_a_run_that_needed_more_raises_the_bound_at_once() -> None:
    before = bound_for(calibration([1.0]), "a")
    after = bound_for(calibration([1.0, 1.4]), "a")
    assert before.upper_ratio == PRIOR_UPPER_RATIO
    assert after.upper_ratio >= 1.4


@pytest.mark.parametrize(("n", "certified"), [(1, 1 / 2), (9, 9 / 10), (19, 0.95), (500, 0.95)])
def test_n_rows_certify_at_most_n_of_n_plus_one(n: int, certified: float) -> None:
    _, level = conformal_upper([1.0] * n, 0.95)
    assert level == pytest.approx(certified)


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=60), st.floats(0.5, 0.99))
def test_the_bound_is_one_of_the_scores_and_grows_with_the_level(scores: list[float], level: float) -> None:
    scores.sort()
    low, _ = conformal_upper(scores, level / 2)
    high, _ = conformal_upper(scores, level)
    assert low in scores
    assert low <= high <= scores[-1]


def test_coverage_on_exchangeable_runs() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        scores = sorted(rng.gauss(1.0, 0.02) for _ in range(40))
        upper, _ = conformal_upper(scores, 0.9)
        covered += rng.gauss(1.0, 0.02) <= upper
    assert covered / 400 > 0.86


def test_a_gpu_learns_nothing_from_runs_on_a_cpu() -> None:
    on_cpu = CalibrationRow(fingerprint="CPU AMD EPYC|t|full", predicted_bytes=100, measured_bytes=230)
    calibration = Calibration(rows=(on_cpu,) * 30)
    assert bound_for(calibration, "NVIDIA A100|t|full") == bound_for(None, "NVIDIA A100|t|full")
    assert bound_for(calibration, "CPU other|t|lora").upper_ratio > 2
