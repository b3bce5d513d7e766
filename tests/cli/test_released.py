"""Databases, run folders and best.yaml files of earlier commits (tests/released) are gone on with."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from autosft.scheduler.finish.given_models import resolve_model
from autosft.studies.export import read_config
from autosft.studies.files.checkpoints import verify
from tests.cli.command import run

RELEASED = Path(__file__).parents[1] / "released"
COMMITS = sorted(
    path.name for path in RELEASED.iterdir() if path.is_dir() and (path / "studies.sql").exists()
)


@pytest.fixture(params=COMMITS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder as that commit left it."""
    folder = tmp_path / "released"
    shutil.copytree(RELEASED / request.param, folder)
    for path in folder.glob("runs/*/best.yaml"):
        path.write_text(path.read_text().replace("@FOLDER@", str(folder)))
    script = (folder / "studies.sql").read_text().replace("@FOLDER@", str(folder))
    with closing(sqlite3.connect(folder / "studies.db")) as connection:
        connection.executescript(script)
    return folder


def storage(folder: Path) -> tuple[str, str]:
    return "--storage", f"sqlite:///{folder / 'studies.db'}"


def test_best_yaml_is_read(folder: Path) -> None:
    full, lora = (read_config(folder / "runs" / name / "best.yaml") for name in ("full", "lora"))
    assert full.settings.adapter is None
    assert lora.settings.adapter is not None
    assert lora.settings.adapter.rank == 4
    assert lora.expected.metric == "eval_perplexity"
    assert lora.expected.minimize


def test_studies_are_shown_compared_and_exported(folder: Path) -> None:
    [shown] = run(folder, "studies", "show", "lora", *storage(folder), "--json")
    assert [item["state"] for item in shown["trials"]] == ["completed", "completed", "waiting", "waiting"]
    [exported] = run(
        folder, "export", "lora", "--output", str(folder / "again.yaml"), *storage(folder), "--json"
    )
    assert exported["trial"] == 1
    before, again = read_config(folder / "runs/lora/best.yaml"), read_config(folder / "again.yaml")
    assert again.settings == before.settings
    assert again.expected == before.expected
    run(folder, "report", "lora", "--output", str(folder / "report.html"), *storage(folder), "--json")
    assert "eval_perplexity" in (folder / "report.html").read_text()


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_study_is_resumed_from_its_checkpoints(folder: Path) -> None:
    events = run(
        folder,
        *("tune", "--model", str(folder / "model"), "--data", str(folder / "chats.jsonl"), *storage(folder)),
        *("--study", "lora", "--output", str(folder / "runs"), "--method", "lora", "--trials", "4"),
        *("--epochs", "12", "--evaluations", "3", "--effective-batch-size", "8", "--lora-rank", "2,4"),
        *("--metric", "eval_perplexity", "--no-prune", "--keep-best", "1", "--hardware", "cpu"),
        *("--warm-start", "none", "--precision", "fp32", "--json"),
    )
    measured = [event["measurement"] for event in events if event["event"] == "trial_measured"]
    assert {item["trial"] for item in measured} == {2, 3}, "what is finished does not run again"
    assert min(item["step"] for item in measured if item["trial"] == 2) > 24, "from its checkpoint"
    assert events[-1]["num_finished"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("study", ["full", "lora"])
def test_best_yaml_trains_to_the_same_value(folder: Path, study: str) -> None:
    path = folder / "runs" / study / "best.yaml"
    [*_, result] = run(
        folder, "train", str(path), "--output", str(folder / "again"), "--hardware", "cpu", "--json"
    )
    # To the rounding of another order of sums, over all steps: perplexities, so 2e-3 nats of the loss.
    assert result["value"] == pytest.approx(read_config(path).expected.final_value, rel=2e-3)
    # What it leaves is a model for every tool that takes a folder.
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place = folder / "again"
    assert result["model"] == str(place)
    verify(place)
    AutoModelForCausalLM.from_pretrained(place)
    assert AutoTokenizer.from_pretrained(place).chat_template
    assert GenerationConfig.from_pretrained(place).eos_token_id is not None
    assert not list(place.glob("optimizer*"))
    found = resolve_model(str(place), [])
    assert (found.source, found.trial) == (str(place), read_config(path).trial)
    answers = run(folder, "chat", str(place), "--prompt", "say 1", "--max-new-tokens", "3", "--json")
    assert list(answers[0]["answers"]) == [str(place)]
