"""Whether a model can be exported is said before it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler.events import Note, StudyEvent
from autosft.scheduler.setup import export_check
from autosft.scheduler.setup.export_check import require_exportable
from tests.workers.small import make_model
from tests.workers.tools.test_gguf_files import Case, folder_of, needs_llama_cpp


def test_without_the_flag_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_check, "run_tool", lambda *_, **__: pytest.fail("it was tried"))
    require_exportable(None, "model", trust_remote_code=False, observe=lambda event: None)


def test_what_was_tried_and_how_it_came_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run_tool(*arguments: str, failure: str) -> str:
        asked.extend(arguments)
        return ""

    monkeypatch.setattr(export_check, "run_tool", run_tool)
    monkeypatch.setattr(export_check, "require_converter", lambda: tmp_path)
    told: list[StudyEvent] = []
    model = str(make_model(tmp_path / "model"))
    require_exportable("gguf", model, trust_remote_code=True, observe=told.append)
    assert asked[1:] == [model, "--family", "--trust-remote-code"]
    assert [event.message for event in told if isinstance(event, Note)][-1].endswith("in llama.cpp.")


@needs_llama_cpp
@pytest.mark.slow
def test_a_family_that_differs_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = folder_of(Case(name="Llama with gelu", config={"hidden_act": "gelu"}), tmp_path / "model")
    with pytest.raises(UserError, match="probabilities differ"):
        require_exportable("gguf", str(folder), trust_remote_code=False, observe=lambda event: None)
