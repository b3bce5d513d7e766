"""A checkpoint scored on its own gives what training measured, on the examples that it is given."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.files.checkpoints import evaluation_path, score_path
from autosft.studies.results.losses import read_losses
from autosft.studies.trial import Measurement, StopReason, Task, TrialJob
from autosft.workers.training.train import train
from tests.workers.small import job, lora, make_data, make_model, settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Data whose final examples are its evaluation examples."""
    folder = make_data(tmp_path / "data")
    shutil.rmtree(folder / "final")
    shutil.copytree(folder / "eval", folder / "final")
    return folder


def trained(job_: TrialJob) -> Measurement:
    reports: list[Measurement] = []
    assert train(job_, reports.append, lambda: None).completed
    return [report for report in reports if report.is_evaluation][-1]


def scoring(job_: TrialJob, checkpoint: str | None) -> TrialJob:
    return dataclasses.replace(job_, task=Task.SCORE, resume_from=checkpoint)


@pytest.mark.parametrize("what", ["full", "lora"])
def test_a_score_is_what_training_measured(what: str, model: Path, data: Path, tmp_path: Path) -> None:
    own = job(model, data, tmp_path / "trial", settings=settings() if what == "full" else lora())
    last = trained(own)
    reports: list[Measurement] = []
    assert train(scoring(own, last.checkpoint), reports.append, lambda: None).completed
    assert reports[-1].metric("eval_loss") == pytest.approx(last.metric("eval_loss"), rel=1e-5)
    assert reports[-1].metric("eval_token_accuracy") == last.metric("eval_token_accuracy")
    assert last.checkpoint is not None
    kept = read_losses(score_path(Path(last.checkpoint)))
    assert (kept.loss, kept.step) == (pytest.approx(last.metric("eval_loss"), rel=1e-5), last.step)
    assert len(kept.num_correct) == 10


def test_a_flipped_byte_is_refused_and_a_stop_is_heard(model: Path, data: Path, tmp_path: Path) -> None:
    own = job(model, data, tmp_path / "trial")
    last = trained(own)
    assert last.checkpoint is not None
    end = train(scoring(own, last.checkpoint), lambda _: None, lambda: StopReason.USER)
    assert (end.completed, end.stopped) == (False, StopReason.USER)
    weights = Path(last.checkpoint) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="sha256 differs"):
        train(scoring(own, last.checkpoint), lambda _: None, lambda: None)
    assert not score_path(Path(last.checkpoint)).exists()


@pytest.mark.parametrize("what", ["full", "lora"])
def test_the_untuned_model_is_scored_as_trials_are(what: str, model: Path, tmp_path: Path) -> None:
    """At a learning rate of next to nothing a trial's evaluation is the untuned model's."""
    data = make_data(tmp_path / "data")
    made = settings if what == "full" else lora
    own = job(model, data, tmp_path / "trial", settings=made(learning_rate=1e-12, weight_decay=0.0))
    last = trained(own)
    untuned = dataclasses.replace(own, task=Task.UNTUNED, trial=-1, output_dir=str(tmp_path / "untuned"))
    reports: list[Measurement] = []
    end = train(untuned, reports.append, lambda: None)
    assert end.completed
    assert end.eval_fingerprint == own.pinned.eval_fingerprint
    assert reports[-1].metric("eval_loss") == pytest.approx(last.metric("eval_loss"), rel=1e-5)
    assert reports[-1].metric("eval_tokens") == last.metric("eval_tokens")
    kept = read_losses(evaluation_path(tmp_path / "untuned", 0))
    of_trial = read_losses(evaluation_path(tmp_path / "trial", 4))
    assert kept.num_tokens == of_trial.num_tokens, "the same tokens, so that they can be paired"
    assert kept.loss_sums == pytest.approx(of_trial.loss_sums, rel=1e-4)


def test_the_untuned_model_is_not_scored_on_other_examples(model: Path, data: Path, tmp_path: Path) -> None:
    own = job(model, data, tmp_path / "untuned", task=Task.UNTUNED)
    other = dataclasses.replace(own, pinned=dataclasses.replace(own.pinned, eval_fingerprint="0" * 64))
    with pytest.raises(UserError, match="not the ones this study is measured on"):
        train(other, lambda _: None, lambda: None)


def test_scoring_the_untuned_model_hears_a_stop(model: Path, data: Path, tmp_path: Path) -> None:
    own = job(model, data, tmp_path / "untuned", task=Task.UNTUNED)
    end = train(own, lambda _: None, lambda: StopReason.USER)
    assert (end.completed, end.stopped) == (False, StopReason.USER)
    assert not evaluation_path(tmp_path / "untuned", 0).exists()
