"""Stops scoring a trial's prompts once it can no longer win."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from autosft.studies.files.checkpoints import prompt_scores_path, trial_dir
from autosft.studies.results.summary import best_measurement, best_trial
from autosft.studies.trial import PromptScoring, TrialRecord


def race_against_best(
    scoring: PromptScoring | None, trials: Iterable[TrialRecord], output_dir: Path
) -> PromptScoring | None:
    """Return the scoring with the study's best checkpoint so far as the incumbent to race against."""
    if scoring is None:
        return None
    best = best_trial(tuple(trials), maximize=True)
    at = None if best is None else best_measurement(best)
    if best is None or at is None or at.evaluation is None:
        return scoring
    incumbent = prompt_scores_path(trial_dir(output_dir, best.number), at.evaluation)
    return replace(scoring, incumbent=str(incumbent))
