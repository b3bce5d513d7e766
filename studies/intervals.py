"""Confidence intervals of what is measured on examples: one estimator for each kind of measurement.

Examples are the sample: an interval covers the value on other examples of the same kind.  scipy is
imported when the first interval is computed, not with this module.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEVEL = 0.95  # of every interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with its 95 % confidence interval, over other examples of the same kind."""

    value: float
    standard_error: float
    low: float
    high: float
    num_examples: int

    @property
    def half(self) -> float:
        """Return half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def is_known(self) -> bool:
        """Whether the interval is finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def mapped(self, function: Callable[[float], float]) -> Interval:
        """Return the interval of an increasing function of the value, such as `exp`, by mapping its ends.

        The standard error is mapped by the delta method, with the slope at the value.
        """
        value = function(self.value)
        step = 1e-6 * max(1.0, abs(self.value))
        slope = (function(self.value + step) - value) / step if math.isfinite(value) else math.inf
        return Interval(
            value=value,
            standard_error=slope * self.standard_error,
            low=function(self.low),
            high=function(self.high),
            num_examples=self.num_examples,
        )


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Interval:
    """Return sum(sums) / sum(counts), given one of each per example, with its interval.

    A ratio estimator, since a loss is a sum over tokens while the sample consists of examples: the variance
    comes from the residuals y_i - R n_i (Cochran 1977, Sampling Techniques, section 2.11), the interval from
    Student's t with one degree of freedom less than there are examples with a count.  Infinite with fewer
    than two such examples, or if a sum is not finite.
    """
    pairs = [(total, count) for total, count in zip(sums, counts, strict=True) if count > 0]
    num_counted = sum(count for _, count in pairs)
    value = math.fsum(total for total, _ in pairs) / num_counted
    num = len(pairs)
    error = math.inf
    if num > 1 and math.isfinite(value):
        squares = math.fsum((total - value * count) ** 2 for total, count in pairs)
        error = math.sqrt(squares * num / (num - 1)) / num_counted
    return from_standard_error(value, error, num)


def mean(values: Sequence[float]) -> Interval:
    """Return the mean of one value per example with its interval, as `mean_from_error` does."""
    value = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean_from_error(value, error, len(values))


def mean_from_error(value: float, standard_error: float, num_examples: int | None) -> Interval:
    """Return the interval of a mean whose standard error is known, as lm-eval reports it.

    If all examples agree, the error is zero although another example might differ: for a share of 0 or 1,
    Wilson's interval is returned instead.
    """
    if standard_error == 0.0 and num_examples and value in (0.0, 1.0):
        return proportion(round(value * num_examples), num_examples)
    return from_standard_error(value, standard_error, num_examples)


def from_standard_error(value: float, standard_error: float, num_examples: int | None) -> Interval:
    """Return the interval of an estimate with a known standard error.

    Uses Student's t with `num_examples` - 1 degrees of freedom, or the normal distribution if the number of
    examples is not known.
    """
    half = math.inf
    if math.isfinite(standard_error) and num_examples != 1:
        half = _quantile(None if num_examples is None else num_examples - 1) * standard_error
    return Interval(
        value=value,
        standard_error=standard_error,
        low=value - half if math.isfinite(half) else -math.inf,
        high=value + half,
        num_examples=num_examples or 0,
    )


def proportion(num_successes: int, num_examples: int) -> Interval:
    """Return a share of examples with its interval (Wilson 1927)."""
    from scipy.stats import binomtest

    assert num_examples > 0
    found = binomtest(num_successes, num_examples).proportion_ci(LEVEL, method="wilson")
    share = num_successes / num_examples
    return Interval(
        value=share,
        standard_error=math.sqrt(share * (1 - share) / num_examples),
        low=float(found.low),
        high=float(found.high),
        num_examples=num_examples,
    )


def share_difference(*, num_gained: int, num_lost: int, num_examples: int) -> Interval:
    """Return the difference of two shares of the same examples with its interval.

    `num_gained` examples count for the first alone, `num_lost` for the second alone.  Agresti & Min 2005,
    "Simple improved confidence intervals for comparing matched proportions": half an example is added to
    each of the four cells, so that the interval has a width where the two never differ.  It is centred on
    that estimate, clipped to -1..1.
    """
    assert num_examples > 0
    num = num_examples + 2
    gained, lost = (num_gained + 0.5) / num, (num_lost + 0.5) / num
    centre = gained - lost
    error = math.sqrt((gained + lost - centre**2) / num)
    half = _quantile(None) * error
    return Interval(
        value=(num_gained - num_lost) / num_examples,
        standard_error=error,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        num_examples=num_examples,
    )


def _quantile(degrees_of_freedom: int | None) -> float:
    """Return the half-width of an interval, in standard errors."""
    from scipy.special import ndtri, stdtrit

    upper = (1 + LEVEL) / 2
    return float(ndtri(upper) if degrees_of_freedom is None else stdtrit(degrees_of_freedom, upper))
