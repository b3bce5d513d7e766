"""What is exported is what other tools take, and trains the same."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tree_sitter
import tree_sitter_powershell
import yaml

from autosft.cli import main
from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method, Precision
from autosft.scheduler.finish.export import export_config, export_for_hub, export_for_tool, run_of
from autosft.scheduler.finish.weights import Weights
from autosft.studies.export import (
    ExportedConfig,
    read_config,
)
from autosft.studies.export.formats import FORMATS, Content, ExportFormat, formats_with
from autosft.studies.files.checkpoints import install
from autosft.studies.trial import Measurement
from autosft.workers.training.train import train
from tests.scheduler.exported_config import NUM_STEPS
from tests.workers.small import job, lora, settings

pytestmark = pytest.mark.usefixtures("cache")


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


TOOLS = formats_with(Content.DATA)


def files_of(tool: str, config: ExportedConfig, data: PreparedData, folder: Path) -> set[str]:
    """Return the names of the files that a format's row writes for its tool."""
    write = FORMATS[tool].files
    assert write is not None
    return set(write(run_of(config, data, folder)[0]))


@pytest.mark.parametrize("tool", TOOLS)
def test_a_folder_holds_what_its_tool_needs_and_where_it_is_from(
    tool: str, config: ExportedConfig, data: PreparedData, tmp_path: Path
) -> None:
    folder = export_for_tool(config, tool, tmp_path / "run", launcher="accelerate").folder
    files = files_of(tool, config, data, tmp_path)
    common = {"best.yaml", "data", "run.ps1", "run.sh", "tokenizer"}
    assert {path.name for path in folder.iterdir()} == common | files
    assert read_config(folder / "best.yaml") == config
    subprocess.run(["bash", "-n", str(folder / "run.sh")], check=True)
    assert is_powershell((folder / "run.ps1").read_bytes())
    for name in files:
        if name.endswith(".json"):
            continue  # has no place for comments
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
    with pytest.raises(UserError, match="is not empty"):
        export_for_tool(config, tool, folder, launcher="python")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_says_that_it_pads_where_the_study_did_not(
    tool: str, config: ExportedConfig, data: PreparedData, tmp_path: Path
) -> None:
    row = replace(config, pinned=replace(config.pinned, padding_free=True))
    for name, one in (("row", row), ("padded", config)):
        folder = export_for_tool(one, tool, tmp_path / name, launcher="python").folder
        texts = [(folder / file).read_text() for file in files_of(tool, one, data, tmp_path)]
        assert any("Here they are padded" in text for text in texts) == (name == "row")


@pytest.mark.parametrize("tool", TOOLS)
def test_a_file_rounds_stochastically_where_the_study_did(
    tool: str, config: ExportedConfig, data: PreparedData, tmp_path: Path
) -> None:
    lean = replace(
        config,
        pinned=replace(config.pinned, precision=Precision.BF16_STOCHASTIC),
        settings=replace(config.settings, optimizer="adamw_torch_8bit"),
    )
    for name, one in (("lean", lean), ("exact", config)):
        folder = export_for_tool(one, tool, tmp_path / name, launcher="python").folder
        text = "".join((folder / file).read_text() for file in files_of(tool, one, data, tmp_path))
        for words in ("bf16_stochastic_round=True", "not bit for bit"):
            assert (words in text) == (name == "lean"), words


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
    # Ours makes the head's gradients in one pass on a CPU, so that the last bit may differ.
    for tool, tolerance in (("script", 2e-6), ("transformers", 1e-5)):
        folder = export_for_tool(found, tool, tmp_path / tool, launcher="python").folder
        runpy.run_path(str(folder / "train.py"), run_name="__main__")
        state = json.loads((folder / "output" / "trainer_state.json").read_text())
        losses = {item["step"]: item["loss"] for item in state["log_history"] if "loss" in item}
        assert losses.keys() == expected.keys()
        assert max(abs(losses[step] - (expected[step] or math.nan)) for step in losses) <= tolerance, tool
        assert (folder / "output" / "final").is_dir()


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
    with pytest.raises(UserError, match="--format no-such-tool: not a format") as raised:
        export_for_tool(config, "no-such-tool", tmp_path / "run", launcher="python")
    assert all(name in str(raised.value) for name in FORMATS)
    assert not (tmp_path / "run").exists()
    assert main(["export", "demo", "--format", "no-such-tool"]) == 2
    assert "no-such-tool: not a format" in capsys.readouterr().err


def test_a_launcher_that_starts_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "demo", "--format", "trl", "--launcher", "torchrun"]) == 2
    assert "it applies to the script of transformers and script only" in capsys.readouterr().err


def test_another_row_is_a_format(
    config: ExportedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ExportFormat(
        name="further",
        summary="for tune run",
        content=Content.DATA,
        files=lambda run: {"recipe.yaml": f"steps: {run.num_steps}\n"},
        command="tune run recipe.yaml",
    )
    monkeypatch.setitem(FORMATS, row.name, row)
    folder = export_for_tool(config, "further", tmp_path / "run", launcher="python").folder
    assert (folder / "recipe.yaml").read_text() == f"steps: {NUM_STEPS}\n"
    assert "exec tune run recipe.yaml" in (folder / "run.sh").read_text()
    adapted: Any = replace(lora(), adapter=replace(lora().adapter, kind="ia3"))  # type: ignore[type-var]
    with pytest.raises(UserError, match="no place for ia3"):
        export_for_tool(replace(config, settings=adapted), "further", tmp_path / "ia3", launcher="python")
