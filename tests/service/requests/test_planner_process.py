"""The warm process that predicts: a question of any client as JSON, answered again without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.discover import profile_hardware, save_profile
from autosft.service.requests import planner_process
from autosft.service.requests.fits import Question
from autosft.service.requests.planner import Planner
from tests.cli.chat_model import make_chat_model

pytestmark = pytest.mark.slow
LIMIT_S = 300.0


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    folder = tmp_path_factory.mktemp("planner")
    save_profile(profile_hardware("cpu"), folder / "devices.json")
    command = python("-m", planner_process.__name__, str(folder / "devices.json"), f"sqlite:///{folder}/s.db")
    made = Planner(command, log=folder / "planner.log", decisive=(folder / "devices.json",))
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "llama"
    make_chat_model(path)
    return path


def asked(model: Path, **changes: object) -> dict[str, object]:
    question = Question(model=str(model), seq_len=64, method="full", **changes)  # type: ignore[arg-type]
    return {"kind": "fits", "fits": question.as_plain()}


def test_a_question_is_answered_as_json_and_kept(planner: Planner, model: Path) -> None:
    first = planner.ask(asked(model))
    answer = first.result(LIMIT_S)
    assert json.loads(json.dumps(answer)) == answer
    assert answer["fits"]
    assert [way["method"] for way in answer["methods"]] == ["full"]
    assert answer["methods"][0]["way"]["upper_bytes"] <= answer["usable_bytes"]
    again = planner.ask(asked(model))
    assert again.done(), "what was asked before waits for the process"
    assert again.result() == answer


def test_another_device_is_another_question(planner: Planner, model: Path) -> None:
    here = planner.ask(asked(model)).result(LIMIT_S)
    there = planner.ask(asked(model, device="A100-80GB")).result(LIMIT_S)
    assert there["device"] != here["device"]
    assert there["num_parameters"] == here["num_parameters"]


def test_what_is_wrong_is_said_and_the_process_goes_on(planner: Planner, model: Path) -> None:
    with pytest.raises(UserError, match="not a method"):
        planner.ask(
            {"kind": "fits", "fits": Question(model=str(model), seq_len=64, method="magic").as_plain()}
        ).result(LIMIT_S)
    assert planner.ask(asked(model)).result(LIMIT_S)["fits"]
