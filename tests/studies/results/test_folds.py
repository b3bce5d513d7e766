"""Studies of a cross-validation taken together: each example once, by a model that was not trained on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autosft.studies.files.checkpoints import UNTUNED_EVALUATION, evaluation_path, untuned_dir
from autosft.studies.results.folds import describe_folds, folds_together
from autosft.studies.results.losses import ExampleLosses
from autosft.studies.values import StudySpec
from tests.studies.study_examples import spec


def losses(*sums: float) -> ExampleLosses:
    return ExampleLosses(step=3, loss_sums=sums, num_tokens=(2,) * len(sums))


def fold(number: int, of: int = 2, folder: Path = Path("nowhere"), **changes: Any) -> StudySpec:
    given = spec(f"fold-{number}", output_dir=str(folder / str(number)))
    return replace(given, data_options={"seed": 0, "fold": f"{number}/{of}"}, **changes)


def test_all_folds_are_one_evaluation(tmp_path: Path) -> None:
    parts = [losses(2.0, 2.0, 4.0), losses(2.0, 2.0)]
    studies = [(fold(at, folder=tmp_path), part) for at, part in enumerate(parts, 1)]
    found = folds_together(studies)
    assert found is not None
    assert (found.score.value, found.score.num_examples) == (pytest.approx(1.2), 5)
    assert found.over_untuned is None
    assert describe_folds(found).startswith("all 2 folds together: eval_loss 1.2")

    for study, part in studies:
        path = evaluation_path(untuned_dir(Path(study.output_dir)), UNTUNED_EVALUATION)
        path.parent.mkdir(parents=True)
        sums = [value + 2.0 for value in part.loss_sums]
        path.write_text(json.dumps({"step": 0, "loss_sums": sums, "num_tokens": part.num_tokens}))
    found = folds_together(studies)
    assert found is not None
    assert found.over_untuned is not None
    assert found.over_untuned.gain.value == pytest.approx(1.0)
    assert "Against the untuned model: loss lower by 1 " in describe_folds(found)


def test_missing_folds_are_counted() -> None:
    found = folds_together([(fold(1, of=5), losses(1.0, 2.0)), (fold(4, of=5), losses(2.0, 2.0))])
    assert found is not None
    assert describe_folds(found).startswith("2 of 5 folds together")


NOT_FOLDS: dict[str, list[tuple[StudySpec, ExampleLosses | None]]] = {
    "studies without folds": [(spec("a"), losses(1.0, 2.0)), (spec("b"), losses(1.0, 2.0))],
    "one fold twice": [(fold(1), losses(1.0, 2.0)), (fold(1), losses(1.0, 2.0))],
    "of different numbers": [(fold(1, of=2), losses(1.0, 2.0)), (fold(2, of=3), losses(1.0, 2.0))],
    "of other data": [(fold(1), losses(1.0, 2.0)), (fold(2, data="other"), losses(1.0, 2.0))],
    "of another model": [(fold(1), losses(1.0, 2.0)), (fold(2, model_fingerprint="other"), losses(1.0, 2.0))],
    "losses that are gone": [(fold(1), losses(1.0, 2.0)), (fold(2), None)],
}


@pytest.mark.parametrize("name", NOT_FOLDS)
def test_what_is_no_cross_validation(name: str) -> None:
    assert folds_together(NOT_FOLDS[name]) is None
