"""Whether tuning has beaten the model that it started from.

Both are evaluated on the same examples, length and mask, and compared example by example.  The best of many
trials was chosen on these very examples, which flatters it a little.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autosft.studies.files.checkpoints import (
    UNTUNED_EVALUATION,
    evaluation_path,
    prompt_scores_path,
    trial_dir,
    untuned_dir,
)
from autosft.studies.formatting import format_metric
from autosft.studies.metrics import Evidence, find_metric
from autosft.studies.results.losses import read_losses, read_passes
from autosft.studies.results.paired import PairedDifference, prompts_difference, tokens_difference
from autosft.studies.results.summary import best_measurement
from autosft.studies.trial import TrialRecord
from autosft.studies.values import UntunedScore


@dataclass(frozen=True, slots=True, kw_only=True)
class OverUntuned:
    """A tuned model beside the one that it started from."""

    metric: str
    untuned: float
    tuned: float
    difference: PairedDifference | None  # None where what was measured by example is not on this machine


def over_untuned(
    study_dir: Path, untuned: UntunedScore | None, trial: TrialRecord | None, *, metric: str
) -> OverUntuned | None:
    """Compare a trial's best checkpoint with the untuned model; None where one of them has no score."""
    before = None if untuned is None else untuned.metric(metric)
    at = None if trial is None else best_measurement(trial)
    after = None if at is None else at.metric(metric)
    if before is None or trial is None or at is None or at.evaluation is None or after is None:
        return None
    return OverUntuned(
        metric=metric,
        untuned=before,
        tuned=after,
        difference=difference_between(study_dir, trial.number, at.evaluation, metric=metric),
    )


def difference_between(
    study_dir: Path, trial: int, evaluation: int, *, metric: str
) -> PairedDifference | None:
    """Compare an evaluation of a trial with the untuned model's, from the files of both."""
    row = find_metric(metric)
    is_of_prompts = row.evidence is Evidence.PROMPTS
    path = prompt_scores_path if is_of_prompts else evaluation_path
    tuned = path(trial_dir(study_dir, trial), evaluation)
    untuned = path(untuned_dir(study_dir), UNTUNED_EVALUATION)
    if not (tuned.is_file() and untuned.is_file()):
        return None
    if not is_of_prompts:
        return tokens_difference(row, read_losses(tuned), read_losses(untuned))
    ours, theirs = read_passes(tuned), read_passes(untuned)
    return None if ours is None or theirs is None else prompts_difference(row, ours, theirs)


# --- text -----------------------------------------------------------------------------------------


def describe_over_untuned(found: OverUntuned | None) -> str:
    """Say whether tuning beat the untuned model, and by how much; empty where it was not scored.

    What does not beat it beyond chance is said to be that.
    """
    if found is None:
        return ""
    values = f"{found.metric} {format_metric(found.tuned)} against {format_metric(found.untuned)}"
    values += " of the untuned model"
    difference = found.difference
    if difference is None:
        return f"{values}; how certain that is cannot be said."
    return f"{verdict(difference)}{values}, {difference.describe()}."


def verdict(difference: PairedDifference) -> str:
    """Return what stands before the figures where the untuned model is not beaten; empty where it is."""
    if difference.is_better:
        return ""
    if difference.is_tie:
        return "Not better than the untuned model beyond chance: "
    return "Worse than the untuned model: "


def describe_untuned(score: UntunedScore | None, metric: str) -> str:
    """Say what the untuned model scores; empty where that is not known."""
    value = None if score is None else score.metric(metric)
    return "" if value is None else f"untuned model: {metric} {format_metric(value)}"
