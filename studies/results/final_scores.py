"""The best checkpoints of a study, scored on examples that were not used to choose them.

The winner remains the checkpoint chosen on the evaluation examples, so its score here is unbiased.  If
another candidate is clearly better here, that is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autosft.studies.formatting import format_number
from autosft.studies.intervals import Interval
from autosft.studies.metrics import find_metric
from autosft.studies.results.losses import ExampleLosses
from autosft.studies.results.summary import Difference, RankedCheckpoint, compare

#: Maximum number of ties that are named; the rest is counted.
MAX_NAMED_TIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalScore:
    """A candidate's score on the final examples, and its difference from the winner there."""

    trial: int
    step: int
    score: Interval
    behind: (
        Difference | None
    )  # paired; None for the winner itself, and for metrics that do not follow the loss
    second: Interval | None = None  # by --final-metric

    @property
    def is_better(self) -> bool:
        """Whether it clearly beats the winner here."""
        return self.behind is not None and self.behind.high < 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A checkpoint and its losses on the final examples."""

    trial: int
    step: int
    losses: ExampleLosses


def interval_of(losses: ExampleLosses, metric: str) -> Interval | None:
    """Return a metric of an evaluation with its interval, None if its sums were not recorded."""
    return find_metric(metric).interval(losses)


def final_scores(
    candidates: Sequence[Scored], *, metric: str, second_metric: str | None = None
) -> tuple[FinalScore, ...]:
    """Compare each candidate with the first, the winner, on the final examples, paired."""
    found = []
    is_paired = find_metric(metric).follows_loss
    for place, candidate in enumerate(candidates):
        score = interval_of(candidate.losses, metric)
        if score is None:
            continue
        found.append(
            FinalScore(
                trial=candidate.trial,
                step=candidate.step,
                score=score,
                behind=compare(candidates[0].losses, candidate.losses) if place and is_paired else None,
                second=None if second_metric is None else interval_of(candidate.losses, second_metric),
            )
        )
    return tuple(found)


# --- text -----------------------------------------------------------------------------------------


def describe_choice(
    ranking: Sequence[RankedCheckpoint],
    chosen_by: Interval | None,
    finals: Sequence[FinalScore],
    *,
    metric: str,
    second_metric: str | None = None,
) -> str:
    """Describe the winner: what it is tied with, and its score on examples not used to choose it.

    "trial 9 step 100: eval_loss 2.74 ± 0.38, tied with trial 9 step 80 and trial 4 step 120; on 160
    examples not used to choose: 2.59 ± 0.31"
    """
    if not ranking:
        return "No checkpoint has been evaluated yet."
    first = ranking[0]
    text = f"trial {first.trial} step {first.step}: {metric} {with_half(first.value, chosen_by)}"
    tied = [f"trial {ranked.trial} step {ranked.step}" for ranked in ranking[1:] if ranked.is_tied]
    if tied:
        text += f", tied with {listed(tied)}"
    winner = next(
        (candidate for candidate in finals if (candidate.trial, candidate.step) == (first.trial, first.step)),
        None,
    )
    if winner is None:
        return f"{text}."
    text += f"; on {winner.score.num_examples} examples not used to choose: "
    text += with_half(winner.score.value, winner.score)
    if winner.second is not None:
        text += f", {second_metric} {with_half(winner.second.value, winner.second)}"
    better = [
        (candidate, candidate.behind) for candidate in finals if candidate.behind and candidate.is_better
    ]
    if better:
        rival, behind = min(better, key=lambda pair: pair[1].nats_per_token)
        text += (
            f". There trial {rival.trial} step {rival.step} is better by "
            f"{format_number(-behind.nats_per_token)} nats per token, beyond chance"
        )
    return f"{text}."


def with_half(value: float, interval: Interval | None) -> str:
    """Format a value with half the width of its interval, to as many digits as the interval justifies."""
    if interval is None or interval.half == 0 or interval.half == float("inf"):
        return f"{value:.4g}"
    return f"{value:.4g} ± {interval.half:.2g}"


def listed(names: Sequence[str]) -> str:
    """Join names into a list, naming the first few only."""
    if len(names) > MAX_NAMED_TIES:
        names = [*names[:MAX_NAMED_TIES], f"{len(names) - MAX_NAMED_TIES} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
