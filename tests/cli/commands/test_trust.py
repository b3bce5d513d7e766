"""Code that ships with a model runs only where this command says so, whatever a database says."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autosft.cli import app
from autosft.profiles.errors import UserError
from autosft.scheduler.finish import inference_client
from autosft.studies.store.records import open_records
from tests.studies.study_examples import opened

COMMANDS = {"chat": ["chat", "study", "--compare", "base", "--prompt", "Hi"], "report": ["report", "study"]}


@pytest.mark.parametrize("trusts", [True, False])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_study_that_trusted_its_model_makes_no_other_command_trust_it(
    name: str, trusts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with closing(open_records(url)) as records:
        study = opened(records, model=str(model), trust_remote_code=True)
        study.release(now=0.0)
    asked: list[bool] = []

    class Client:
        def __init__(self, _models: object, *, trust_remote_code: bool, **_: Any) -> None:
            asked.append(trust_remote_code)
            raise UserError("no model is loaded in this test")

    base = (inference_client.NamedModel(name="base", source=str(model)),)
    monkeypatch.setattr(inference_client, "InferenceClient", Client)
    monkeypatch.setattr(inference_client, "models_of_study", lambda *_: base)
    monkeypatch.setattr(inference_client, "prepared_folder", lambda _: tmp_path)
    monkeypatch.chdir(tmp_path)
    flag = ["--trust-remote-code"] if trusts else []
    CliRunner().invoke(app, [*COMMANDS[name], "--storage", url, *flag])
    assert asked == [trusts]
