"""`tune --export` and `train --export` export what they have trained, once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autosft.commands import export as export_command
from autosft.commands import train, tune
from autosft.profiles.errors import StudyFailedError, UserError
from autosft.scheduler.events import Note, StudyEvent
from autosft.scheduler.finish import export_served
from autosft.scheduler.finish.export import Exported
from autosft.studies.request import TuneRequest
from tests.workers.small import make_model


def concluded(folder: Path, **changes: Any) -> Any:
    values = {"study": "it", "best_trial": 3, "best_step": 40, "best_yaml": folder / "best.yaml", **changes}
    return SimpleNamespace(**values)


def exporting(calls: list[Any]) -> Any:
    def write(name: str, trial: str, to: Any, output: Path, asked: Any, *, storage: str | None) -> Any:
        calls.append((name, trial, to.name, output, storage))
        output.mkdir(parents=True)
        (output / f"{name}.gguf").touch()
        return 3, Exported(folder=output, command="ollama create it", notes=("compared",))

    return write


def test_the_best_trial_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    told: list[StudyEvent] = []
    monkeypatch.setattr(export_command, "write_study", exporting(calls))
    request = TuneRequest(export="gguf", storage="sqlite:///x.db")
    tune.export_best(request, concluded(tmp_path), observe=told.append)
    place = tmp_path / "exports" / "trial-0003-step-000040"
    assert calls == [("it", "3", "gguf", place, "sqlite:///x.db")]
    said = [event.message for event in told if isinstance(event, Note)]
    assert said[1:] == ["compared", f"Exported trial 3: {place}", "Next: ollama create it"]
    tune.export_best(request, concluded(tmp_path), observe=told.append)
    assert len(calls) == 1
    assert str(place) in str(told[-1])
    tune.export_best(request, concluded(tmp_path, best_step=60), observe=told.append)
    assert calls[-1][3].name == "trial-0003-step-000060"


@pytest.mark.parametrize("missing", [{"best_trial": None}, {"best_yaml": None}])
def test_without_a_best_trial_nothing_is_exported(
    missing: dict[str, None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_command, "write_study", lambda *_, **__: pytest.fail("it was exported"))
    tune.export_best(TuneRequest(export="gguf"), concluded(tmp_path, **missing), observe=lambda event: None)


def test_an_export_that_fails_does_not_make_the_request_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError("it differs", remedy="Use vLLM.")

    monkeypatch.setattr(export_command, "write_study", refuse)
    monkeypatch.setattr(export_served, "export_served", refuse)
    with pytest.raises(StudyFailedError, match=r"(?s)the study is complete.*it differs.*autosft export it "):
        tune.export_best(TuneRequest(export="gguf"), concluded(tmp_path), observe=lambda event: None)
    model = make_model(tmp_path / "model")
    with pytest.raises(StudyFailedError, match=r"(?s)the model is trained.*it differs"):
        train.export_model(model, "gguf", trust_remote_code=False, observe=lambda event: None)


def test_a_trained_model_is_exported_into_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def write(weights: Any, to: str, output: Path) -> Exported:
        asked.append((weights.checkpoint, to, output))
        output.mkdir(parents=True)
        (output / "m.gguf").touch()
        return Exported(folder=output, command="llama-server")

    monkeypatch.setattr(export_served, "export_served", write)
    model = make_model(tmp_path / "model")
    told: list[StudyEvent] = []
    for _ in range(2):
        train.export_model(model, "gguf", trust_remote_code=False, observe=told.append)
    assert asked == [(model, "gguf", model / "exports" / "gguf")]
    assert "exported already" in str(told[-1])
