"""How much better one model is than another on the same examples, by any metric, with its interval.

Example by example, so that what makes an example hard for both cancels: intervals of the two values may
overlap widely where this one is clear of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autosft.studies.intervals import Interval, ratio, share_difference
from autosft.studies.metrics import Evidence, Metric, TokenSums, known_metric


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """How much better the first of two models is: positive where it is better, whatever the metric."""

    metric: str
    gain: Interval
    is_loss: bool  # in nats per token, since the metric follows the loss; else in the metric's own unit
    minimize: bool

    @property
    def is_tie(self) -> bool:
        """Whether chance alone could make it."""
        return self.gain.low <= 0.0 <= self.gain.high

    @property
    def is_better(self) -> bool:
        return self.gain.low > 0.0

    def amount(self) -> str:
        """Return "loss lower by 0.103 ± 0.059 nats per token"; the sign says what the first model's does."""
        what = "loss" if self.is_loss else self.metric
        is_lower = (self.gain.value >= 0) == self.minimize
        unit = " nats per token" if self.is_loss else ""
        by = f"{abs(self.gain.value):.3g} ± {self.gain.half:.2g}{unit}"
        return f"{what} {'lower' if is_lower else 'higher'} by {by}"

    def describe(self) -> str:
        """Return the amount with what it rests on."""
        metric = known_metric(self.metric)
        is_of_prompts = metric is not None and metric.evidence is Evidence.PROMPTS
        examples = "prompts" if is_of_prompts and not self.is_loss else "examples"
        return f"{self.amount()} (95 % interval over {self.gain.num_examples} {examples}, paired)"


def tokens_difference(metric: Metric, first: TokenSums, second: TokenSums) -> PairedDifference | None:
    """Compare two models by a metric of tokens on the same evaluation.

    None where an older version did not keep the sums, or the evaluations scored different tokens.
    """
    if metric.sums is None or tuple(first.num_tokens) != tuple(second.num_tokens):
        return None
    ours, theirs = metric.sums(first), metric.sums(second)
    if not ours or not theirs:
        return None
    sign = 1 if metric.minimize else -1
    gains = [sign * (their - our) for our, their in zip(ours, theirs, strict=True)]
    return PairedDifference(
        metric=metric.name,
        gain=ratio(gains, first.num_tokens),
        is_loss=metric.follows_loss,
        minimize=metric.minimize,
    )


def prompts_difference(
    metric: Metric, first: Sequence[bool], second: Sequence[bool]
) -> PairedDifference | None:
    """Compare two models by which of the same prompts they followed; None where they differ in number."""
    if len(first) != len(second) or not first:
        return None
    pairs = list(zip(first, second, strict=True))
    gain = share_difference(
        num_gained=sum(ours and not theirs for ours, theirs in pairs),
        num_lost=sum(theirs and not ours for ours, theirs in pairs),
        num_examples=len(pairs),
    )
    return PairedDifference(metric=metric.name, gain=gain, is_loss=False, minimize=metric.minimize)
