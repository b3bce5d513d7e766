"""How certain a mean over tokens is, when examples are what was sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autosft.studies.results.racing import wilson_interval

LEVEL = 0.95  # of every interval


Z95 = 1.959964


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value and where it would lie, 95 times of 100, with other examples of the same kind."""

    value: float
    standard_error: float
    low: float
    high: float
    num_examples: int

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def ratio(sums: Sequence[float], num_tokens: Sequence[int]) -> Interval:
    """Return sum(sums) / sum(num_tokens), both by example, with its interval.

    A ratio estimator, since a loss is a sum over tokens while examples are what was sampled: variance from
    the residuals y_i - R n_i (Cochran 1977, Sampling Techniques, section 2.11), interval from Student's t
    with one degree of freedom less than there are examples with tokens.  Infinite where these are fewer
    than two or a sum is not finite.
    """
    from scipy.stats import t

    pairs = [(one, tokens) for one, tokens in zip(sums, num_tokens, strict=True) if tokens > 0]
    total = sum(tokens for _, tokens in pairs)
    value = math.fsum(one for one, _ in pairs) / total
    num = len(pairs)
    if num < 2 or not math.isfinite(value):
        return Interval(value=value, standard_error=math.inf, low=-math.inf, high=math.inf, num_examples=num)
    squares = math.fsum((one - value * tokens) ** 2 for one, tokens in pairs)
    error = math.sqrt(squares * num / (num - 1)) / total
    half = float(t.ppf((1 + LEVEL) / 2, num - 1)) * error
    return Interval(value=value, standard_error=error, low=value - half, high=value + half, num_examples=num)


def metric_interval(
    metric: str, *, loss_sums: Sequence[float], num_correct: Sequence[int], num_tokens: Sequence[int]
) -> Interval | None:
    """Return an `eval_*` metric with its interval; None for one that cannot be had from these sums.

    A perplexity's interval is that of its logarithm, and so not quite in the middle.
    """
    if metric == "eval_loss":
        return ratio(loss_sums, num_tokens)
    if metric == "eval_token_accuracy" and num_correct:
        return ratio(num_correct, num_tokens)
    if metric == "eval_perplexity":
        loss = ratio(loss_sums, num_tokens)
        return Interval(
            value=_exp(loss.value),
            standard_error=_exp(loss.value) * loss.standard_error,
            low=_exp(loss.low),
            high=_exp(loss.high),
            num_examples=loss.num_examples,
        )
    return None


def _exp(power: float) -> float:
    return math.exp(power) if power < 700 else math.inf


def ratio_error(mean: float, pairs: Sequence[tuple[float, int]]) -> float:
    """Return the standard error of a mean over tokens where examples were drawn (Cochran 1977, 2.11)."""
    num, total = len(pairs), sum(count for _, count in pairs)
    if num < 2:
        return math.inf
    squares = math.fsum((loss - mean * count) ** 2 for loss, count in pairs)
    return math.sqrt(squares * num / (num - 1)) / total


def mean_interval(value: float, error: float, num: int | None) -> tuple[float, float]:
    """Return the interval of a mean by its standard error.

    Where examples are all alike the error is nought, and yet another example may differ: of a share, 0 or 1,
    Wilson's is given then.
    """
    if error == 0.0 and num and value in (0.0, 1.0):
        return wilson_interval(value * num, num)
    return value - Z95 * error, value + Z95 * error
