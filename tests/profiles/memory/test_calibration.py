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
    row_of,
)
from autosft.profiles.recipe import ByteRange
from tests.plans import memory_estimate


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
    assert bound_for(calibration, "CPU AMD EPYC|t|full").upper_ratio > 2


OTHERS = {
    "another precision": "CPU AMD EPYC|torch 2.13|full|bf16-autocast|off",
    "another method": "CPU AMD EPYC|torch 2.13|lora|fp32|off",
    "another version": "CPU AMD EPYC|torch 2.12|full|fp32|off",
    "another machine": "CPU other|torch 2.13|full|fp32|off",
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("num", [2, 30])
def test_what_others_have_needed_does_not_widen_a_bound(other: str, num: int) -> None:
    own = "CPU AMD EPYC|torch 2.13|full|fp32|off"
    assert bound_for(calibration([1.28] * num, OTHERS[other]), own).upper_ratio == PRIOR_UPPER_RATIO
    assert bound_for(calibration([1.28] * num, own), own).upper_ratio >= 1.28


def test_few_runs_of_its_own_widen_a_bound_that_others_narrow() -> None:
    others = calibration([1.0] * 30, "b").rows
    assert bound_for(Calibration(rows=others), "a").upper_ratio < PRIOR_UPPER_RATIO
    both = Calibration(rows=(*others, *calibration([1.2], "a").rows))
    assert bound_for(both, "a").upper_ratio >= 1.2


def test_a_run_that_died_is_no_evidence_beyond_its_cap() -> None:
    need = ByteRange(median_bytes=100, upper_bytes=120)
    estimate = memory_estimate(need=need, uncalibrated_bytes=100, stack="a")
    died = row_of(estimate, 300, out_of_memory=True)
    assert died is not None
    ratio = died.measured_bytes / died.predicted_bytes
    assert ratio == pytest.approx(1.02 * estimate.need.upper_bytes / estimate.need.median_bytes, rel=0.02)
    lived = row_of(estimate, 300)
    assert lived is not None
    assert lived.measured_bytes == 300
