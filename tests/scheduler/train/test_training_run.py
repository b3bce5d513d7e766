"""`autosft train`: where a configuration runs, and what becomes of the run."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autosft.cli import main
from autosft.profiles.dataset.ifeval_prompts import read_prompts
from autosft.profiles.errors import UserError
from autosft.scheduler.decide.history import NOTHING_LEARNED, Learned
from autosft.scheduler.events import Note, StudyOpened
from autosft.scheduler.finish.export import export_config
from autosft.scheduler.setup.prompt_set import prompt_set
from autosft.scheduler.train import attempt, config_inputs, training_run
from autosft.scheduler.train.attempt import Outcome
from autosft.scheduler.train.overrides import NO_OVERRIDES, Overrides, with_overrides
from autosft.scheduler.train.training_run import Devices, plan_file
from autosft.studies.export import (
    ExportedConfig,
    PromptSource,
)
from autosft.studies.files.checkpoints import checkpoint_dir, install
from autosft.studies.metrics import METRICS
from autosft.studies.store.database import default_storage_url
from autosft.studies.trial import FailureKind, TrialJob
from tests.studies import study_examples
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Script
from tests.workers.small import settings

pytestmark = pytest.mark.usefixtures("cache")


def test_a_configuration_is_planned_for_a_device_that_is_not_here(
    config: ExportedConfig, tmp_path: Path
) -> None:
    written = export_config(config, tmp_path / "best.yaml")
    said: list[Any] = []
    planned = plan_file(
        written.folder,
        devices=Devices(hardware="RTX-4060-Laptop"),
        overrides=NO_OVERRIDES,
        observe=said.append,
    )
    assert planned.plan.micro_batch * planned.plan.gradient_accumulation == 8
    [opened] = said
    [changed] = [line for line in opened.plan_lines if line.startswith("Changed for this machine")]
    assert f"micro batch 2 -> {planned.plan.micro_batch}" in changed


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="halves a CPU")
def test_two_devices_together_learn_what_one_does(config: ExportedConfig, tmp_path: Path) -> None:
    found = replace(config, settings=settings(num_train_examples=8 * 4))
    file = export_config(found, tmp_path / "best.yaml").folder
    results = []
    for hardware in ("cpu", "2xcpu"):
        said: list[Any] = []
        result = training_run.train_file(
            file, devices=Devices(hardware=hardware), output=tmp_path / hardware, observe=said.append
        )
        results.append(result)
    assert results[0].is_complete
    assert results[1].is_complete
    assert results[1].value == pytest.approx(results[0].value, rel=2e-5)
    [opened] = [item for item in said if isinstance(item, StudyOpened)]
    assert "Devices: 2 x 1/2 of" in "".join(opened.plan_lines)
    assert " x 2 devices (" in "".join(opened.plan_lines)


@pytest.mark.slow
def test_what_runs_out_of_memory_is_replanned_smaller(
    config: ExportedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are made up: two run out of memory, the third would go on."""
    micro_batches: list[int] = []

    def run_attempt(job: TrialJob, *_: Any, **__: Any) -> Outcome:
        micro_batches.append(job.plan.micro_batch)
        failure = FailureKind.OUT_OF_MEMORY if len(micro_batches) < 3 else None
        return Outcome(
            job=job, end=study_examples.end(job.trial, job.attempt, failure=failure), evaluations=()
        )

    monkeypatch.setattr(training_run, "run_attempt", run_attempt)
    monkeypatch.setattr(training_run, "warm_server", contextlib.nullcontext)
    file = export_config(config, tmp_path / "best.yaml").folder
    said: list[Any] = []
    result = training_run.train_file(
        file, devices=Devices(hardware="cpu"), output=tmp_path / "run", observe=said.append
    )
    assert result.is_complete
    assert len(micro_batches) == 3
    notes = [item.message for item in said if isinstance(item, Note)]
    assert len(notes) == 2
    assert all("ran out of memory and is replanned" in note for note in notes)


def test_a_run_that_is_repeated_reports_its_result(
    config: ExportedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is made up: 1.4 at step 6 is its best, 1.5 at step 8 its end."""
    script = Script(num_steps=8, eval_losses=(2.0, 1.8, 1.4, 1.5))
    monkeypatch.setattr(attempt, "LocalRunner", lambda server: FakeRunner(lambda job: script))
    monkeypatch.setattr(attempt, "lease_or_wait", lambda job, devices, **_: contextlib.ExitStack())
    monkeypatch.setattr(training_run, "install_model", lambda checkpoint, folder: None)  # there is none
    monkeypatch.setattr(training_run, "warm_server", contextlib.nullcontext)
    file = export_config(config, tmp_path / "best.yaml").folder
    results = []
    for _ in range(2):
        results.append(
            training_run.train_file(
                file, devices=Devices(hardware="cpu"), output=tmp_path / "run", observe=print
            )
        )
        weights = tmp_path / "staged"
        weights.mkdir()
        install(weights, checkpoint_dir(tmp_path / "run", 8))
    assert [
        (result.is_complete, result.value, result.best_value, result.best_step) for result in results
    ] == [(True, 1.5, 1.4, 6)] * 2


def test_prompts_that_a_study_was_compared_by_are_asked_again(
    config: ExportedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is made up; what it is told to score is not."""
    pytest.importorskip("lm_eval", reason="the optional part 'eval' is not installed")
    prompts = [
        {"key": at, "prompt": f"Say {at}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
        for at in range(5)
    ]
    source = tmp_path / "ifeval.json"
    source.write_text(json.dumps(prompts))
    asked = prompt_set(METRICS["ifeval"], str(source), max_new_tokens=8, seed=3)
    found = replace(
        config,
        expected=replace(config.expected, metric="ifeval", minimize=False),
        pinned=replace(config.pinned, prompts_fingerprint=asked.fingerprint),
        prompts=PromptSource(source=str(source), max_new_tokens=8, seed=3),
    )
    file = export_config(found, tmp_path / "best.yaml").folder
    jobs: list[TrialJob] = []

    def run_attempt(job: TrialJob, *_: Any, **__: Any) -> Outcome:
        jobs.append(job)
        measured = tuple(
            replace(study_examples.evaluation(job.trial, 1, number), metrics=(("ifeval", score),))
            for number, score in enumerate((0.2, 0.4, 0.3), start=1)
        )
        return Outcome(job=job, end=study_examples.end(job.trial, job.attempt), evaluations=measured)

    def run(output: str, **changes: str) -> training_run.TrainingResult:
        return training_run.train_file(
            file,
            devices=Devices(hardware="cpu"),
            output=tmp_path / output,
            observe=lambda event: None,
            overrides=Overrides(**changes),  # type: ignore[arg-type]
        )

    monkeypatch.setattr(training_run, "run_attempt", run_attempt)
    monkeypatch.setattr(training_run, "warm_server", contextlib.nullcontext)
    result = run("run")
    assert (result.value, result.best_value, result.best_step) == (0.3, 0.4, 20)
    scoring = jobs[0].scoring
    assert scoring is not None
    assert read_prompts(scoring.prompts) == asked.prompts
    assert scoring.max_new_tokens == 8

    run("unasked", prompts="none")
    assert jobs[1].scoring is None
    source.write_text(json.dumps(prompts[:4]))
    with pytest.raises(UserError, match=r"the 4 prompts .* are not those"):
        run("others")
    with pytest.raises(UserError, match="which uses no prompts"):
        with_overrides(config, Overrides(prompts=str(source)))


@pytest.mark.parametrize("storage", ["sqlite:////nowhere/studies.db", None], ids=["--storage", "none given"])
def test_a_run_is_planned_with_what_the_named_database_has_learned(
    storage: str | None, config: ExportedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def learned(url: str) -> Learned:
        asked.append(url)
        return NOTHING_LEARNED

    monkeypatch.setattr(config_inputs, "learned_so_far", learned)
    file = export_config(config, tmp_path / "best.yaml").folder
    given = [] if storage is None else ["--storage", storage]
    assert main(["train", str(file), "--hardware", "cpu", "--dry-run", "--quiet", *given]) == 0
    assert asked == [storage or default_storage_url()]
