"""Intervals: against scipy's and tabulated values, and one estimator wherever a metric is shown."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest

from autosft.studies.intervals import (
    Interval,
    from_standard_error,
    mean,
    mean_from_error,
    proportion,
    ratio,
)

#: Half of a 95 % interval in standard errors, by examples: Student's t as tabulated, the normal's without.
QUANTILES = {2: 12.706, 3: 4.303, 5: 2.776, 30: 2.045, 1001: 1.962, None: 1.960}


@pytest.mark.parametrize(("num_examples", "quantile"), QUANTILES.items())
def test_half_an_interval_by_the_number_of_examples(num_examples: int | None, quantile: float) -> None:
    found = from_standard_error(10.0, 2.0, num_examples)
    assert found.half == pytest.approx(2 * quantile, rel=1e-3)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_a_ratio_of_equal_counts_is_a_mean() -> None:
    """One estimator: the interval of a loss and that of a user's numbers are the same where both apply."""
    rng = random.Random(0)
    values = [rng.gauss(2.0, 0.5) for _ in range(5)]
    by_token, by_example = ratio([value * 10 for value in values], [10] * 5), mean(values)
    assert by_token.low == pytest.approx(by_example.low)
    assert by_token.high == pytest.approx(by_example.high)
    assert by_example == mean_from_error(by_example.value, by_example.standard_error, 5)


def test_shares() -> None:
    found = proportion(135, 541)
    assert (round(found.low, 3), round(found.high, 3)) == (0.215, 0.288)  # 25 % is known to 3.7 points
    assert proportion(0, 10).low == 0.0
    assert mean([1.0] * 60).low == pytest.approx(60 / (60 + 1.96**2), rel=1e-3), "60 of 60 is not certain"
    assert mean([2.0] * 60).half == 0.0, "no share, and all alike"


@pytest.mark.parametrize(
    "found",
    [mean([3.0]), ratio([3.0, 0.0], [2, 0]), from_standard_error(1.0, math.nan, 9), ratio([math.inf], [1])],
)
def test_what_is_not_known_is_not_claimed(found: Interval) -> None:
    assert not found.is_known
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_an_increasing_functions_interval_is_mapped_by_its_ends() -> None:
    found = ratio([10.0, 40.0, 24.0], [10, 20, 12])
    mapped = found.mapped(math.exp)
    assert (mapped.low, mapped.high) == (math.exp(found.low), math.exp(found.high))
    assert mapped.standard_error == pytest.approx(mapped.value * found.standard_error, rel=1e-4)


def test_importing_metrics_and_intervals_imports_no_scipy() -> None:
    modules = "autosft.studies.metrics, autosft.studies.results.racing"
    code = f"import sys, {modules}; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
