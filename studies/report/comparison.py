"""Comparison of several studies, and a study as a table of its trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.studies.intervals import Interval
from autosft.studies.metrics import find_metric
from autosft.studies.results.final_scores import interval_of
from autosft.studies.results.folds import FoldsTogether, folds_together
from autosft.studies.results.losses import ExampleLosses, losses_of
from autosft.studies.results.summary import Difference, best_measurement, best_trial, compare
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import TrialRecord
from autosft.studies.values import Direction, StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedStudy:
    """A study in a comparison."""

    spec: StudySpec
    num_finished: int
    best: TrialRecord | None  # None until a trial has been evaluated
    interval: Interval | None  # of its best value; None if its per-example losses are gone
    training_s: float  # total over all trials
    gain: Difference | None  # of its best over the first study's best, paired
    why_no_gain: str  # empty with a gain, and for the first study


def compare_studies(studies: Sequence[StudyRecords]) -> tuple[ComparedStudy, ...]:
    """Compare the best trial of each study with that of the first, paired by example if that is fair."""
    losses = [_losses_of_best(study) for study in studies]
    compared = []
    for place, study in enumerate(studies):
        spec = study.spec
        why = "" if place == 0 else _why_not(studies[0].spec, spec, losses[0], losses[place])
        first, own = losses[0], losses[place]
        gain = compare(own, first) if place and not why and own and first else None
        trials = study.trials()
        compared.append(
            ComparedStudy(
                spec=spec,
                num_finished=study.num_finished(),
                best=_best(study),
                interval=None if own is None else interval_of(own, spec.metric),
                training_s=sum(duration_s(trial) or 0.0 for trial in trials),
                gain=gain,
                why_no_gain=why,
            )
        )
    return tuple(compared)


def folds_of(studies: Sequence[StudyRecords]) -> FoldsTogether | None:
    """Return the common score of the studies where they are the folds of a cross-validation."""
    return folds_together([(study.spec, _losses_of_best(study)) for study in studies])


def _best(study: StudyRecords) -> TrialRecord | None:
    return best_trial(study.trials(), maximize=study.spec.direction is Direction.MAXIMIZE)


def _losses_of_best(study: StudyRecords) -> ExampleLosses | None:
    best = _best(study)
    at = None if best is None else best_measurement(best)
    if best is None or at is None or at.evaluation is None:
        return None
    return losses_of(Path(study.spec.output_dir), best.number, at.evaluation)


def _why_not(
    first: StudySpec, other: StudySpec, of_first: ExampleLosses | None, of_other: ExampleLosses | None
) -> str:
    """Return why two studies' values cannot be compared directly; empty if they can."""
    if first.metric != other.metric:
        return f"by {other.metric}, not {first.metric}"
    if first.pinned.eval_fingerprint != other.pinned.eval_fingerprint:
        return "evaluated on other tokens"
    if not find_metric(first.metric).follows_loss:
        return f"{first.metric} is not paired by example"
    if of_first is None or of_other is None:
        return "losses per example are gone, or no trial was evaluated"
    return ""


def duration_s(trial: TrialRecord) -> float | None:
    """Return the time from a trial's first start to its end, including pauses, in seconds."""
    if trial.started_at is None or trial.finished_at is None:
        return None
    return trial.finished_at - trial.started_at


def trials_as_rows(spec: StudySpec, trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return one flat row per trial, for spreadsheets: the same columns in each, units in their names."""
    names = list(spec.space.searched())
    return [_row(spec, trial, names) for trial in trials]


def _row(spec: StudySpec, trial: TrialRecord, names: Sequence[str]) -> dict[str, Any]:
    parameters = dict(trial.parameters)
    plan, last = trial.plan, trial.measurements[-1] if trial.measurements else None
    peaks = [
        measurement.peak_allocated_bytes
        for measurement in trial.measurements
        if measurement.peak_allocated_bytes
    ]
    return {
        "trial": trial.number,
        "state": trial.state.value,
        "origin": trial.origin,
        spec.metric: trial.value,
        "best_step": trial.best_step,
        **{name: parameters.get(name) for name in names},
        "num_attempts": trial.num_attempts,
        "device": None if plan is None else plan.device_name,
        "micro_batch": None if plan is None else plan.micro_batch,
        "gradient_accumulation": None if plan is None else plan.gradient_accumulation,
        "predicted_memory_bytes": None if plan is None else plan.predicted_bytes,
        "measured_memory_bytes": max(peaks, default=None),
        "num_tokens": None if last is None else last.num_tokens,
        "tokens_per_s": None if last is None else last.tokens_per_s,
        "duration_s": duration_s(trial),
        "failure": None if trial.failure is None else trial.failure.value,
        "message": trial.message,
        "best_checkpoint": trial.best_checkpoint,
    }
