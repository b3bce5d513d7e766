"""`autosft tune --dry-run`: the plan of a study, and nothing begun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft import cli
from autosft.scheduler.decide import cost_models
from autosft.scheduler.setup import open_study
from tests.cli.chat_model import make_chat_model, write_chats
from tests.cli.commands.test_plan import MEMORY


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("study")
    model = make_chat_model(folder / "model")
    return ("--model", str(model), "--data", str(write_chats(folder / "chats.jsonl")), "--method", "lora")


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folders of the test's own, a formula in the place of the memory model, and no Ray."""

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("a dry run needs no cluster")

    for name in ("CACHE", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setattr(cost_models, "estimate", lambda *_, **__: MEMORY)
    monkeypatch.setattr(open_study, "start_local", no_ray)


def dry_run(*arguments: str) -> int:
    return cli.main(["tune", "--dry-run", *arguments])


@pytest.mark.slow
def test_the_whole_plan_is_shown_and_nothing_is_begun(
    study: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(*study, "--hardware", "2x24GB", "--trials", "6") == 0
    out = capsys.readouterr().out
    for words in (
        "24 GB: planned for A10G",
        "6 trials",
        "Device: 2 x A10G",
        "Search: learning_rate",
        "Plan:",
    ):
        assert words in out
    assert "Dry run: nothing was started; the same command without --dry-run begins the study." in out
    assert not list((tmp_path / "data").rglob("*.db"))
    assert not (tmp_path / "data" / "autosft" / "studies").exists()
    assert dry_run(*study, "--hardware", "24GB", "--json") == 0
    event = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (event["event"], event["num_finished"]) == ("study_opened", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--hardware", "RTX-3050-Laptop"), "4.0 GiB"),  # too small: what is missing, and what would fit
        (("--hardware", "24GB", "--address", "auto"), "Leave --address out"),
        (("--hardware", "24GB", "--time-budget", "1s"), "not even one full run"),
    ],
)
def test_what_the_study_would_be_refused_for_is_said(
    study: tuple[str, ...], arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(*study, *arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--model", "--data"])
def test_a_wrong_path_is_told_before_ray_starts(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --dry-run too: `start_local` would fail this test."""
    data = write_chats(tmp_path / "chats.jsonl")
    given = {"--model": "gpt2", "--data": str(data), flag: str(tmp_path / "chats.json")}
    assert cli.main(["tune", "--hardware", "cpu", *(word for pair in given.items() for word in pair)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "there is no such folder" in message or "Did you mean" in message
