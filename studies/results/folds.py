"""The studies of a cross-validation taken together.

Each example is scored by the best trial of the one study that did not train on it, so that the examples of
all folds are one large evaluation.  The best trial of a fold was chosen on that fold's examples, which
flatters it a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.dataset.split import Fold, parse_fold
from autosft.studies.files.checkpoints import UNTUNED_EVALUATION, evaluation_path, untuned_dir
from autosft.studies.formatting import format_metric
from autosft.studies.intervals import Interval
from autosft.studies.metrics import find_metric
from autosft.studies.results.losses import ExampleLosses, read_losses
from autosft.studies.results.paired import PairedDifference, tokens_difference
from autosft.studies.values import StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldsTogether:
    """The scores of all folds' examples, as one evaluation."""

    metric: str
    num_folds: int
    num_all: int  # folds that there are
    score: Interval
    over_untuned: PairedDifference | None  # None where an untuned model's losses are missing


def folds_together(studies: Sequence[tuple[StudySpec, ExampleLosses | None]]) -> FoldsTogether | None:
    """Return the common score of studies that are folds of one data set; None if they are not.

    Each study comes with the losses of its best trial, None where they are gone.
    """
    first = studies[0][0]
    folds = [fold_of(spec) for spec, _ in studies]
    tuned = [losses for _, losses in studies if losses is not None]
    of = {fold.of for fold in folds if fold is not None}
    are_folds = None not in folds and len(of) == 1 and len(set(folds)) == len(folds)
    if not are_folds or len(tuned) < len(studies) or not all(alike(first, spec) for spec, _ in studies):
        return None
    row, together = find_metric(first.metric), joined(tuned)
    score = row.interval(together)
    if score is None:
        return None
    paths = [evaluation_path(untuned_dir(Path(spec.output_dir)), UNTUNED_EVALUATION) for spec, _ in studies]
    has_untuned = all(path.is_file() for path in paths)
    untuned = joined([read_losses(path) for path in paths]) if has_untuned else None
    return FoldsTogether(
        metric=row.name,
        num_folds=len(studies),
        num_all=of.pop(),
        score=score,
        over_untuned=None if untuned is None else tokens_difference(row, together, untuned),
    )


def fold_of(spec: StudySpec) -> Fold | None:
    """Return which part of its data a study compares trials on, if it is one fold of several."""
    fold = (spec.data_options or {}).get("fold")
    return None if fold is None else parse_fold(str(fold))


def alike(first: StudySpec, other: StudySpec) -> bool:
    """Whether two studies differ in their fold alone, as far as their scores depend on it."""

    def facts(spec: StudySpec) -> tuple[object, ...]:
        options = {name: value for name, value in (spec.data_options or {}).items() if name != "fold"}
        return spec.model_fingerprint, spec.data, spec.metric, spec.pinned.eval_seq_len, options

    return facts(first) == facts(other)


def joined(parts: Sequence[ExampleLosses]) -> ExampleLosses:
    """Return several evaluations as one, in their order."""
    has_correct = all(part.num_correct for part in parts)
    return ExampleLosses(
        step=0,
        loss_sums=tuple(value for part in parts for value in part.loss_sums),
        num_tokens=tuple(value for part in parts for value in part.num_tokens),
        num_correct=tuple(value for part in parts for value in part.num_correct) if has_correct else (),
    )


def describe_folds(found: FoldsTogether) -> str:
    """Describe the common score of a cross-validation, and how far it is above chance."""
    is_whole = found.num_folds == found.num_all
    which = f"all {found.num_all} folds" if is_whole else f"{found.num_folds} of {found.num_all} folds"
    text = (
        f"{which} together: {found.metric} {format_metric(found.score.value)} ± {found.score.half:.2g} "
        f"(95 % interval over {found.score.num_examples} examples, each scored by a model not trained on it)"
    )
    difference = found.over_untuned
    if difference is None:
        return f"{text}."
    return (
        f"{text}. Against the untuned model: {difference.amount()}{', a tie' if difference.is_tie else ''}."
    )
