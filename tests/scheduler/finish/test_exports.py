"""What is exported is what other tools take, and trains the same."""

from __future__ import annotations

import contextlib
import json
import math
import os
import runpy
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tree_sitter
import tree_sitter_powershell
import yaml

from autosft.cli import main
from autosft.profiles.dataset.ifeval_prompts import read_prompts
from autosft.profiles.dataset.prepare import prepare
from autosft.profiles.dataset.prepared import PreparedData, tokens_fingerprint
from autosft.profiles.errors import UserError
from autosft.profiles.model.profile import load_model_profile
from autosft.profiles.recipe import Method
from autosft.scheduler.decide.history import NOTHING_LEARNED, Learned
from autosft.scheduler.events import Note, StudyOpened
from autosft.scheduler.finish.export import export_config, export_for_hub, export_for_tool
from autosft.scheduler.finish.weights import Weights
from autosft.scheduler.setup.prompt_set import prompt_set
from autosft.scheduler.train import attempt, config_inputs, training_run
from autosft.scheduler.train.attempt import Outcome
from autosft.scheduler.train.config_inputs import read_inputs
from autosft.scheduler.train.overrides import NO_OVERRIDES, Overrides, with_overrides
from autosft.scheduler.train.training_run import Devices, plan_file
from autosft.studies.export import (
    DataSource,
    Expected,
    ExportedConfig,
    ModelSource,
    PromptSource,
    read_config,
)
from autosft.studies.export.formats import FORMATS, Content, ExportFormat
from autosft.studies.files.checkpoints import checkpoint_dir, install
from autosft.studies.store.database import default_storage_url
from autosft.studies.trial import FailureKind, Measurement, TrialJob
from autosft.workers.training.train import train
from tests.studies import study_examples
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Script
from tests.workers.small import job, lora, make_model, pinned, plan, settings

NUM_STEPS = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts with completions, and a cache."""
    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "model")
    lines = [
        {"prompt": f"w{i} w{i + 1} ", "completion": " ".join(f"w{i + k}" for k in range(2, 3 + n))}
        for i in range(2, 20)
        for n in range(4)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autosft.scheduler.train.config_inputs.cache_folder", lambda: home / "cache")


@pytest.fixture(scope="module")
def data(home: Path) -> PreparedData:
    profile = load_model_profile(str(home / "model"))
    return prepare(
        str(home / "data.jsonl"),
        model=str(home / "model"),
        cache_dir=home / "cache" / "data",
        max_positions=profile.max_positions,
    )


@pytest.fixture(scope="module")
def config(home: Path, data: PreparedData) -> ExportedConfig:
    return ExportedConfig(
        format=1,
        autosft="0.1.0",
        study='a "study" \\ of 🦙',
        trial=2,
        model=ModelSource(
            name=str(home / "model"), fingerprint=load_model_profile(str(home / "model")).fingerprint
        ),
        data=DataSource(
            source=str(home / "data.jsonl"),
            fingerprint=data.fingerprint,
            tokens_fingerprint=tokens_fingerprint(data),
        ),
        settings=settings(num_train_examples=8 * NUM_STEPS),
        pinned=pinned(data.path),
        expected=Expected(
            metric="eval_loss", value=1.5, step=8, num_tokens=500, final_value=1.5, peak_allocated_bytes=None
        ),
        plan=plan(micro_batch=2, effective_batch_size=8),
        environment={
            "hardware": {"devices": [{"name": "CPU", "kind": "cpu"}]},
            "packages": {"torch": "2.13"},
        },
    )


def weights(config: ExportedConfig, checkpoint: Path) -> Weights:
    return Weights(
        name="tuned",
        checkpoint=checkpoint,
        base=config.model.name,
        is_adapter=config.settings.adapter is not None,
    )


def is_powershell(script: bytes) -> bool:
    """Whether a script has PowerShell's syntax; to run one takes PowerShell."""
    language = tree_sitter.Language(tree_sitter_powershell.language())
    return not tree_sitter.Parser(language).parse(script).root_node.has_error


def test_the_check_of_powershell_can_fail() -> None:
    assert is_powershell(b"Set-Location $PSScriptRoot\n")
    assert not is_powershell(b'Set-Location "$PSScriptRoot\n')


FILES = {
    "trl": {"sft.yaml"},
    "transformers": {"train.py", "training_arguments.json"},
    "script": {"train.py"},
    "axolotl": {"axolotl.yaml"},
    "llamafactory": {"llamafactory.yaml"},
}


@pytest.mark.parametrize("tool", FILES)
def test_a_folder_holds_what_its_tool_needs_and_where_it_is_from(
    tool: str, config: ExportedConfig, tmp_path: Path
) -> None:
    folder = export_for_tool(config, tool, tmp_path / "run", launcher="accelerate").folder
    common = {"best.yaml", "data", "run.ps1", "run.sh", "tokenizer"}
    assert {path.name for path in folder.iterdir()} == common | FILES[tool]
    assert read_config(folder / "best.yaml") == config
    subprocess.run(["bash", "-n", str(folder / "run.sh")], check=True)
    assert is_powershell((folder / "run.ps1").read_bytes())
    for name in FILES[tool] - {"training_arguments.json"}:
        text = (folder / name).read_text()
        assert config.model.fingerprint in text
        assert config.data.fingerprint in text
        assert "Predicted memory" in text
        if name.endswith(".py"):
            compile(text, name, "exec")
        else:
            fields = yaml.safe_load(text)
            assert fields["learning_rate"] == config.settings.learning_rate
            assert isinstance(fields["adam_epsilon"], float), "1e-08 is text to YAML 1.1"
    with pytest.raises(UserError, match="holds files already"):
        export_for_tool(config, tool, folder, launcher="python")


@pytest.mark.parametrize("tool", ["trl", "script", "llamafactory"])
def test_a_file_says_that_it_pads_where_the_study_did_not(
    tool: str, config: ExportedConfig, tmp_path: Path
) -> None:
    row = replace(config, pinned=replace(config.pinned, padding_free=True))
    for name, one in (("row", row), ("padded", config)):
        folder = export_for_tool(one, tool, tmp_path / name, launcher="python").folder
        [file] = FILES[tool]
        assert ("Here they are padded" in (folder / file).read_text()) == (name == "row")


@pytest.mark.slow
def test_trl_parses_its_file_and_transformers_its_own(config: ExportedConfig, tmp_path: Path) -> None:
    from transformers import HfArgumentParser, TrainingArguments
    from trl.scripts.sft import make_parser

    found = replace(config, settings=lora(num_train_examples=64))
    folder = export_for_tool(found, "trl", tmp_path / "trl", launcher="python").folder
    file = str(folder / "sft.yaml")
    script, training, model, _ = make_parser().parse_args_and_config(
        ["--config", file], fail_with_unknown_args=True
    )
    assert (script.dataset_name, model.use_peft, model.lora_target_modules) == ("data", True, "all-linear")
    assert (training.max_steps, training.gradient_accumulation_steps, training.max_length) == (8, 4, None)

    folder = export_for_tool(config, "transformers", tmp_path / "hf", launcher="python").folder
    (arguments,) = HfArgumentParser(TrainingArguments).parse_json_file(
        str(folder / "training_arguments.json"), allow_extra_keys=False
    )
    assert (arguments.warmup_steps, arguments.optim) == (1, "adamw_torch")


@pytest.mark.slow
@pytest.mark.parametrize("method", [Method.FULL, Method.LORA])
def test_the_exported_scripts_learn_what_the_study_learned(
    method: Method, config: ExportedConfig, data: PreparedData, tmp_path: Path
) -> None:
    what = settings if method is Method.FULL else lora
    found = replace(config, settings=what(num_train_examples=8 * NUM_STEPS))
    reports: list[Measurement] = []
    ours = job(
        Path(config.model.name),
        data.path,
        tmp_path / "ours",
        settings=found.settings,
        pinned=found.pinned,
        plan=found.plan,
    )
    train(ours, reports.append, lambda: None)
    expected = {report.step: report.loss for report in reports if report.loss is not None}
    assert len(expected) == NUM_STEPS
    for tool, tolerance in (("script", 0.0), ("transformers", 1e-5)):
        folder = export_for_tool(found, tool, tmp_path / tool, launcher="python").folder
        runpy.run_path(str(folder / "train.py"), run_name="__main__")
        state = json.loads((folder / "output" / "trainer_state.json").read_text())
        losses = {item["step"]: item["loss"] for item in state["log_history"] if "loss" in item}
        assert losses.keys() == expected.keys()
        assert max(abs(losses[step] - (expected[step] or math.nan)) for step in losses) <= tolerance, tool
        assert (folder / "output" / "final").is_dir()


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
def test_what_runs_out_of_memory_is_planned_again_smaller(
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
    assert all("ran out of memory and is planned again" in note for note in notes)


def test_a_run_that_is_asked_for_again_says_what_it_came_to(
    config: ExportedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is made up: 1.4 at step 6 is its best, 1.5 at step 8 its end."""
    script = Script(num_steps=8, eval_losses=(2.0, 1.8, 1.4, 1.5))
    monkeypatch.setattr(attempt, "LocalRunner", lambda server: FakeRunner(lambda job: script))
    monkeypatch.setattr(attempt, "lease_or_wait", lambda job, devices, **_: contextlib.ExitStack())
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
    asked = prompt_set(str(source), max_new_tokens=8, seed=3)
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

    run("unasked", ifeval_data="none")
    assert jobs[1].scoring is None
    source.write_text(json.dumps(prompts[:4]))
    with pytest.raises(UserError, match=r"the 4 prompts .* are not those"):
        run("others")
    with pytest.raises(UserError, match="which asks no prompts"):
        with_overrides(config, Overrides(ifeval_data=str(source)))


def test_other_data_and_other_weights_are_refused(config: ExportedConfig, home: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.jsonl"
    lines = (home / "data.jsonl").read_text().splitlines(keepends=True)
    changed.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="is not the data"):
        read_inputs(with_overrides(config, Overrides(data=str(changed))))
    other = tmp_path / "other"
    shutil.copytree(home / "model", other)
    shape = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**shape, "rms_norm_eps": 0.5}))
    with pytest.raises(UserError, match="is not the model"):
        read_inputs(with_overrides(config, Overrides(model=str(other))))


def test_the_same_tokens_under_another_fingerprint_are_the_same_data(
    config: ExportedConfig, home: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(home / "data.jsonl", moved)
    by_another_version = replace(config, data=replace(config.data, fingerprint="0" * 64))
    read_inputs(with_overrides(by_another_version, Overrides(data=str(moved))))
    unknown = replace(by_another_version, data=replace(by_another_version.data, tokens_fingerprint=""))
    with pytest.raises(UserError, match="is not the data"):
        read_inputs(unknown)


def test_best_yaml_goes_into_a_folder_or_a_file(config: ExportedConfig, tmp_path: Path) -> None:
    for output, path in (("a/b.yaml", "a/b.yaml"), ("c", "c/best.yaml")):
        written = export_config(config, tmp_path / output)
        assert written.folder == tmp_path / path
        assert read_config(tmp_path / path) == config


def test_weights_with_a_flipped_byte_are_not_exported(config: ExportedConfig, tmp_path: Path) -> None:
    staged, checkpoint = tmp_path / "staged", tmp_path / "step-000008"
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(b"weights")
    install(staged, checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UserError, match="sha256 differs"):
        export_for_hub(config, weights(config, checkpoint), tmp_path / "hub", merge=False, sentences=[])
    assert not (tmp_path / "hub").exists()


@pytest.mark.slow
def test_a_folder_for_the_hub_has_a_card_and_no_resume_state(
    config: ExportedConfig, data: PreparedData, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    found = replace(config, settings=lora(num_train_examples=64))
    ours = job(
        Path(config.model.name), data.path, tmp_path / "ours", settings=found.settings, pinned=found.pinned
    )
    reports: list[Measurement] = []
    train(ours, reports.append, lambda: None)
    checkpoint = Path(reports[-1].checkpoint or "")
    folders = {
        merge: export_for_hub(
            found, weights(found, checkpoint), tmp_path / str(merge), merge=merge, sentences=["It is good."]
        ).folder
        for merge in (False, True)
    }
    names = {path.name for path in folders[False].iterdir()}
    assert {"README.md", "adapter_model.safetensors", "best.yaml", "tokenizer.json"} <= names
    assert not {
        name for name in names if name.startswith(("optimizer", "rng_state", "scheduler", "manifest"))
    }
    assert not list(folders[True].glob("adapter*"))
    tokens = torch.tensor([[2, 3, 4, 5]])
    logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in folders.values()]
    assert torch.allclose(*logits, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(config.model.name)(tokens).logits
    assert not torch.allclose(base, logits[1], atol=1e-3)

    card = (folders[True] / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    assert yaml.safe_load(metadata)["library_name"] == "transformers"
    assert "It is good." in text
    for file in ("README.md", "best.yaml"):
        assert str(tmp_path.parent) not in (folders[True] / file).read_text(), "it tells of somebody's disk"
    assert read_config(folders[True] / "best.yaml").settings == found.settings


def test_without_an_adapter_there_is_nothing_to_merge(config: ExportedConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter to merge"):
        export_for_hub(config, weights(config, tmp_path), tmp_path / "hub", merge=True, sentences=[])


def test_a_pruned_model_is_trained_by_autosft_alone(config: ExportedConfig, tmp_path: Path) -> None:
    sparse: Any = replace(config, settings=settings(method=Method.SPARSE))
    with pytest.raises(UserError, match="keeps zeros"):
        export_for_tool(sparse, "trl", tmp_path / "run", launcher="python")


def test_an_unknown_format_is_an_error_that_lists_the_known(
    config: ExportedConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--format torchtune: not a format") as raised:
        export_for_tool(config, "torchtune", tmp_path / "run", launcher="python")
    assert all(name in str(raised.value) for name in FORMATS)
    assert not (tmp_path / "run").exists()
    assert main(["export", "demo", "--format", "torchtune"]) == 2
    assert "torchtune: not a format" in capsys.readouterr().err


def test_a_launcher_that_starts_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "demo", "--format", "trl", "--launcher", "torchrun"]) == 2
    assert "it chooses what starts the script of transformers and script" in capsys.readouterr().err


def test_a_further_row_is_a_format(
    config: ExportedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ExportFormat(
        name="torchtune",
        summary="for tune run",
        content=Content.DATA,
        files=lambda run: {"recipe.yaml": f"steps: {run.num_steps}\n"},
        command="tune run recipe.yaml",
    )
    monkeypatch.setitem(FORMATS, row.name, row)
    folder = export_for_tool(config, "torchtune", tmp_path / "run", launcher="python").folder
    assert (folder / "recipe.yaml").read_text() == f"steps: {NUM_STEPS}\n"
    assert "exec tune run recipe.yaml" in (folder / "run.sh").read_text()
    adapted: Any = replace(lora(), adapter=replace(lora().adapter, kind="ia3"))  # type: ignore[type-var]
    with pytest.raises(UserError, match="no place for ia3"):
        export_for_tool(replace(config, settings=adapted), "torchtune", tmp_path / "ia3", launcher="python")


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
