"""Summary of a study with its uncertainty, as values and as text.  Pure.

Two models are compared on the same evaluation examples, example by example, so that the difficulty of an
example cancels.  The intervals do not cover two effects: the best of many trials was chosen on these very
examples (which flatters its gain a little), and another seed would have given another result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autosft.studies.intervals import ratio
from autosft.studies.metrics import find_metric
from autosft.studies.results.losses import ExampleLosses
from autosft.studies.trial import Measurement, TrialRecord, TrialState
from autosft.studies.values import AttemptRecord

_RESULTS = (TrialState.COMPLETED, TrialState.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much lower one model's loss is than another's: positive if the first is better."""

    nats_per_token: float
    standard_error: float
    low: float  # 95 % interval
    high: float
    num_examples: int

    @property
    def is_tie(self) -> bool:
        return self.low <= 0.0 <= self.high


def compare(first: ExampleLosses, second: ExampleLosses) -> Difference:
    """Return how much lower `first`'s loss is, paired over examples and weighted by tokens.

    Intervals as in `ratio`; infinite with fewer than two scored examples.  `first` and `second` have to be
    from the same evaluation.
    """
    assert first.num_tokens == second.num_tokens, "different evaluations cannot be paired"
    gains = [theirs - ours for ours, theirs in zip(first.loss_sums, second.loss_sums, strict=True)]
    gain = ratio(gains, first.num_tokens)
    return Difference(
        nats_per_token=gain.value,
        standard_error=gain.standard_error,
        low=gain.low,
        high=gain.high,
        num_examples=gain.num_examples,
    )


def best_trial(trials: Sequence[TrialRecord], *, maximize: bool) -> TrialRecord | None:
    """Return the best completed or stopped trial; the earliest in a tie, None if no trial has a value."""
    return next(iter(ranked_trials(trials, maximize=maximize)), None)


def ranked_trials(trials: Sequence[TrialRecord], *, maximize: bool) -> list[TrialRecord]:
    """Return the completed and stopped trials with a value, best first; the earliest first in a tie."""
    scored = [
        (-trial.value if maximize else trial.value, trial.number, trial)
        for trial in trials
        if trial.state in _RESULTS and trial.value is not None and math.isfinite(trial.value)
    ]
    return [trial for _, _, trial in sorted(scored, key=lambda entry: entry[:2])]


def best_measurement(trial: TrialRecord) -> Measurement | None:
    """Return the evaluation at a trial's best step."""
    return next(
        (measurement for measurement in trial.measurements if measurement.step == trial.best_step), None
    )


def peak_bytes(attempts: Sequence[AttemptRecord], trial: TrialRecord) -> int | None:
    """Return the maximum memory measured over a trial's attempts, in bytes; None if not measured."""
    of_attempts = [attempt.peak_allocated_bytes or 0 for attempt in attempts]
    of_reports = [measurement.peak_allocated_bytes or 0 for measurement in trial.measurements]
    return max([*of_attempts, *of_reports], default=0) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedCheckpoint:
    """An evaluated checkpoint and its difference from the best."""

    trial: int
    evaluation: int
    step: int
    value: float
    behind: Difference | None  # None for the best itself, and if per-example losses are missing
    is_tied: bool  # with the best; the best is tied with itself


Losses = Callable[[int, int], ExampleLosses | None]  # (trial number, evaluation number) -> losses


def rank_checkpoints(
    trials: Sequence[TrialRecord], losses: Losses, *, metric: str, maximize: bool, limit: int = 10
) -> tuple[RankedCheckpoint, ...]:
    """Return the best evaluated checkpoints of a study, and whether each is tied with the first.

    Every evaluation of every completed or stopped trial is a candidate, not only the last.
    """
    candidates = [
        (value, trial.number, measurement.step, measurement.evaluation)
        for trial in trials
        if trial.state in _RESULTS and trial.value is not None and math.isfinite(trial.value)
        for measurement in trial.measurements
        if measurement.evaluation is not None
        and (value := measurement.metric(metric)) is not None
        and math.isfinite(value)
    ]
    candidates.sort(key=lambda candidate: (-candidate[0] if maximize else candidate[0], *candidate[1:]))
    if not candidates:
        return ()
    best = losses(candidates[0][1], candidates[0][3]) if find_metric(metric).follows_loss else None
    ranked = []
    for place, (value, trial_number, step, evaluation) in enumerate(candidates[:limit]):
        other = losses(trial_number, evaluation) if place and best is not None else None
        behind = compare(best, other) if best is not None and other is not None else None
        ranked.append(
            RankedCheckpoint(
                trial=trial_number,
                evaluation=evaluation,
                step=step,
                value=value,
                behind=behind,
                is_tied=place == 0 or (behind is not None and behind.is_tie) or value == candidates[0][0],
            )
        )
    return tuple(ranked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The results of a study so far."""

    metric: str
    best: TrialRecord | None  # None until a trial has been evaluated
    default: TrialRecord | None  # the rule-based configuration's trial, once it has a value
    gain: Difference | None  # of the best over the default, in nats per token
    ranking: tuple[RankedCheckpoint, ...]


def summarise(trials: Sequence[TrialRecord], losses: Losses, *, metric: str, maximize: bool) -> Summary:
    """Summarise a study's trials; `losses` returns an evaluation's per-example losses, None if missing."""
    best = best_trial(trials, maximize=maximize)
    default = next((trial for trial in trials if trial.is_default and trial.value is not None), None)
    gain = None
    is_paired = find_metric(metric).follows_loss
    if is_paired and best is not None and default is not None and best.number != default.number:
        pair = [
            losses(trial.number, at.evaluation)
            for trial in (best, default)
            if (at := best_measurement(trial)) is not None and at.evaluation is not None
        ]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
            gain = compare(pair[0], pair[1])
    ranking = rank_checkpoints(trials, losses, metric=metric, maximize=maximize)
    return Summary(metric=metric, best=best, default=default, gain=gain, ranking=ranking)


# --- text -----------------------------------------------------------------------------------------


def describe_gain(summary: Summary) -> str:
    """Describe what the search gained over the default configuration; a tie is called a tie."""
    best, default, gain = summary.best, summary.default, summary.gain
    if best is None:
        return "No trial has been evaluated yet."
    if default is None:
        return f"Best {summary.metric} {best.value:.4g}; the default configuration has not been evaluated."
    if best.number == default.number:
        return f"The default configuration is the best found, {summary.metric} {best.value:.4g}."
    against = f"{summary.metric} {best.value:.4g} against {default.value:.4g} of the default configuration"
    if gain is None:
        return f"{against}; the uncertainty is not known."
    half = (gain.high - gain.low) / 2
    measured = (
        f"loss lower by {gain.nats_per_token:.3g} ± {half:.2g} nats per token "
        f"(95 % interval over {gain.num_examples} examples, paired)"
    )
    if gain.is_tie:
        return f"{against}: a tie, {measured}."
    return f"{against}: {measured}."


def describe_ranking(ranking: Sequence[RankedCheckpoint]) -> str:
    """Describe the best checkpoint and those that are tied with it."""
    if not ranking:
        return "No checkpoint has been evaluated yet."
    first = ranking[0]
    tied = [f"trial {ranked.trial} step {ranked.step}" for ranked in ranking[1:] if ranked.is_tied]
    best = f"Best checkpoint: trial {first.trial} step {first.step}, {first.value:.4g}"
    return f"{best}, tied with {', '.join(tied)}." if tied else f"{best}."
