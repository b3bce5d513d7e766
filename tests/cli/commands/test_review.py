"""The commands that show a study and take it elsewhere: report, export, chat."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from autosft import cli
from autosft.commands import chat
from autosft.scheduler.finish import inference_client
from autosft.studies.report import Answer
from autosft.studies.store.records import Driver, open_records
from autosft.studies.trial import TrialState
from tests.studies import study_examples

NAME = "a study: 🦙"


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database with a study: trial 1 is the best and has its checkpoint, trial 2 has not been evaluated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"sqlite:///{tmp_path}/studies.db"
    records = open_records(url)
    study = records.open_study(study_examples.spec(NAME, data_options={"max_rounds": 2}), now=1.0)
    study.take_over(Driver.current(), now=1.0)
    for name in ("checkpoint", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for number, value in enumerate((2.5, 1.5)):
        study.ask(now=2.0)
        study_examples.start(study, number)
        checkpoint = str(tmp_path / "checkpoint") if number == 1 else str(tmp_path / "gone")
        study.record(study_examples.evaluation(number, 1, 1, value, checkpoint=checkpoint), now=3.0)
        study.end_attempt(study_examples.end(number, 1), TrialState.COMPLETED, now=4.0)
    study.ask(now=5.0)
    study.release(now=5.0)
    records.close()
    return url


class FakeAnswering:
    """Says its model's name and the last message back."""

    asked: ClassVar[list[list[dict[str, str]]]] = []

    def __init__(self, models: Sequence[inference_client.NamedModel], **_: Any) -> None:
        self.models = models

    def __enter__(self) -> FakeAnswering:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, conversations: Any, *, max_new_tokens: int) -> list[list[str]]:
        return [[f"{model.name} says {c[-1]['content']}" for c in conversations] for model in self.models]

    def ask_one(
        self, model: inference_client.NamedModel, conversation: Any, *, max_new_tokens: int, on_text: Any
    ) -> str:
        self.asked.append([dict(item) for item in conversation])
        self.is_stopped = False
        words = f"{model.name} says {conversation[-1]['content']}"
        on_text(words[:4])
        if conversation[-1]["content"] == "interrupt me":
            signal.raise_signal(signal.SIGINT)
        if self.is_stopped:
            return words[:4]
        on_text(words[4:])
        return words

    def stop(self) -> None:
        self.is_stopped = True

    def samples(
        self, data_dir: Path, num: int, *, max_new_tokens: int, on_share: Callable[[float], object]
    ) -> tuple[Answer, ...]:
        answers = tuple((model.name, f"by {model.source}") for model in self.models)
        return tuple(Answer(prompt=f"prompt {i}", expected="this", answers=answers) for i in range(num))


@pytest.fixture
def fake_answering(monkeypatch: pytest.MonkeyPatch) -> type[FakeAnswering]:
    FakeAnswering.asked = []
    monkeypatch.setattr(inference_client, "InferenceClient", FakeAnswering)
    monkeypatch.setattr(inference_client, "prepared_folder", lambda spec: Path("data"))
    return FakeAnswering


def test_a_report_is_written_with_answers(
    storage: str, fake_answering: type[FakeAnswering], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", NAME, "--storage", storage, "--output", "r.html", "--answers", "2"]) == 0
    assert "r.html" in capsys.readouterr().out
    page = Path("r.html").read_text()
    assert page.count('class="prompt"') == 2
    assert "by models/tiny" in page


def test_a_report_without_the_data_says_why_it_has_no_answers(
    storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", NAME, "--storage", storage, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["report"] == "report.html"
    assert "No answers in the report: the prepared data of study" in err
    assert cli.main(["report", NAME, "--storage", storage, "--output", "no/such/folder.html"]) == 2


def test_best_yaml_is_exported(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", NAME, "--storage", storage, "--output", "b.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trial"] == 1
    text = Path("b.yaml").read_text()
    assert "max_rounds: 2" in text
    assert cli.main(["export", NAME, "--storage", storage, "--trial", "0", "--quiet"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == "best.yaml"


WRONG = {
    "a trial that is not there": (["export", NAME, "--trial", "9"], "has trials 0 to 2"),
    "a trial without a value": (["export", NAME, "--trial", "2"], "has not been evaluated"),
    "merging elsewhere": (["export", NAME, "--format", "trl", "--merge"], "Only --format hub"),
    "a checkpoint that is gone": (
        ["chat", NAME, "--compare", "0", "--prompt", "x"],
        "no checkpoint of trial 0",
    ),
    "JSON of a conversation": (["chat", NAME, "--json"], "needs --prompt or --samples"),
    "samples of a folder": (["chat", "model", "--samples", "1"], "belongs to no study here"),
    "an unknown base": (["chat", "model", "--compare", "base", "--prompt", "x"], "what model was tuned from"),
    "a trial of no study": (["chat", "model", "--compare", "3", "--prompt", "x"], "belongs to no study"),
    "a file": (["chat", "model/config.json", "--prompt", "x"], "neither a GGUF file nor a best.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case: str, storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    line, said = WRONG[case]
    assert cli.main([*line, "--storage", storage]) == 2
    assert said in capsys.readouterr().err


def test_a_prompt_is_answered_side_by_side(
    storage: str,
    fake_answering: type[FakeAnswering],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = ["chat", NAME, "--storage", storage, "--prompt", "hello"]
    monkeypatch.setenv("COLUMNS", str(chat.NARROW))
    assert cli.main(line) == 0
    assert any("base says hello" in row and "best says hello" in row for row in lines(capsys))
    monkeypatch.setenv("COLUMNS", str(chat.NARROW - 1))
    assert cli.main(line) == 0
    assert lines(capsys)[:4] == ["base", "base says hello", "best", "best says hello"]
    assert cli.main([*line, "--json", "--compare", "best,1,folder"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert answers == {name: f"{name} says hello" for name in ("best", "trial 1", "folder")}


def test_ctrl_c_ends_an_answer_and_not_the_conversation(
    storage: str,
    fake_answering: type[FakeAnswering],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("sys.stdin", io.StringIO("interrupt me\nand then\n"))
    assert cli.main(["chat", "checkpoint", "--storage", storage]) == 0
    out = capsys.readouterr().out
    assert "chec (stopped)" in out
    assert "checkpoint says and then" in out
    assert [item["content"] for item in fake_answering.asked[1]] == ["interrupt me", "chec", "and then"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["checkpoint", "--compare", "base"], ["base", "checkpoint"]),
        (["checkpoint", "--compare", "model,base,0"], None),
        (["model"], ["model"]),
        (["checkpoint", "--compare", "best"], ["checkpoint", "best"]),
    ],
)
def test_a_folder_is_compared_with_what_it_was_tuned_from(
    line: list[str],
    expected: list[str] | None,
    storage: str,
    fake_answering: type[FakeAnswering],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = cli.main(["chat", *line, "--storage", storage, "--prompt", "x", "--json"])
    if expected is None:
        assert code == 2, "the checkpoint of trial 0 is gone"
        return
    assert code == 0
    assert list(json.loads(capsys.readouterr().out)["answers"]) == expected


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_in_a_conversation_each_model_resumes_from_its_own_answers(
    storage: str, fake_answering: type[FakeAnswering], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/new\nthree\n"))
    assert cli.main(["chat", NAME, "--storage", storage, "--compare", "base", "--system", "be kind"]) == 0
    before = {"role": "system", "content": "be kind"}
    assert fake_answering.asked[0] == [before, {"role": "user", "content": "one"}]
    said = [[item["content"] for item in asked] for asked in fake_answering.asked]
    assert said[1] == ["be kind", "one"]  # the tuned model beside the base
    assert said[2:4] == [["be kind", "one", f"{name} says one", "two"] for name in ("base", "best")]
    assert said[4:] == [["be kind", "three"]] * 2
