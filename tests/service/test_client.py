"""The client, and the commands that ask a server, against the application itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autosft import cli
from autosft.commands.submissions import time_of
from autosft.profiles.errors import UserError
from autosft.service import client as client_module
from autosft.service.api.context import Service
from autosft.service.client import Client
from autosft.service.values import ItemState
from tests.service.api.fakes import ADA, FITS, HOST, NOW, ROOT, client, prediction, run, served, tokens
from tests.service.api.studies import example_config, example_study

SERVER = f"http://{HOST}"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service that every client of this process reaches without a network."""
    for name in ("AUTOSFT_SERVER", "AUTOSFT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with served(tmp_path, local_user=ROOT) as made:
        transport = client(made)._transport
        make = Client.__init__

        def connected(self: Client, url: str, **options: Any) -> None:
            make(self, url, transport=transport, sleep=lambda _: None, **options)

        monkeypatch.setattr(client_module.Client, "__init__", connected)
        (tmp_path / "data" / "chats.jsonl").write_text("{}")
        (tmp_path / "data" / "llama").mkdir()
        yield made


def autosft(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """Run a command against the server; return what it says."""
    ended = cli.main([*words, "--server", SERVER])
    said = capsys.readouterr()
    assert ended == code, said.err
    return said.out if code == 0 else said.err


def test_a_client_submits_finds_and_changes(service: Service) -> None:
    with Client(SERVER) as asking:
        item = asking.submit("tune", {"model": "llama", "data": "chats.jsonl"}, name="first", priority=2)
        assert asking.find("first")["id"] == asking.find(str(item["id"]))["id"] == item["id"]
        assert asking.act(item["id"], "priority", priority=-1)["priority"] == -1
        second = asking.clone(item["id"], {"learning_rate": 1e-4}, name="second")
        assert [each["name"] for each in asking.items()] == ["first", "second"]
        assert second["cloned_from"] == item["id"]
        assert asking.me() == {"name": "root", "role": "admin"}
        with pytest.raises(UserError, match="There is no 'third'"):
            asking.find("third")


def test_an_answer_that_is_lost_does_not_queue_twice(service: Service) -> None:
    import httpx2

    with Client(SERVER) as asking:
        send, lost = asking._http.request, []

        def lossy(*given: Any, **more: Any) -> Any:
            answer = send(*given, **more)
            if not lost:
                lost.append(answer)
                raise httpx2.ReadTimeout("lost")
            return answer

        asking._http.request = lossy  # type: ignore[method-assign]
        asking.submit("tune", {})
    assert len(lost) == len(service.queue.items()) == 1


def test_a_refusal_is_the_servers_own_words(service: Service) -> None:
    with Client(SERVER, token="made-up") as asking, pytest.raises(UserError) as refusal:
        asking.items()
    assert "was revoked" in refusal.value.message
    assert "AUTOSFT_TOKEN" in str(refusal.value.remedy)


def test_a_token_of_the_environment_is_used(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSFT_TOKEN", tokens(service, ADA)["ada"])
    with Client(SERVER) as asking:
        assert asking.me()["name"] == "ada"


def test_tune_on_a_server_queues_follows_and_ends_as_alone(
    service: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    submit = service.queue.submit

    def at_once(*given: Any, **more: Any) -> Any:
        item, is_new = submit(*given, **more)
        running = run(service, item)
        (tmp_path / f"{item.id}.log").write_text("trial 0 starts\n")
        service.queue.end(item.id, launch=running.launch, to=outcome[0], note="it hit a wall", now=NOW)
        return service.queue.get(item.id), is_new

    service.queue.submit = at_once  # type: ignore[method-assign]
    outcome = [ItemState.DONE]
    said = autosft(capsys, "tune", "--model", "data/llama", "--data", "data/chats.jsonl", "--trials", "4")
    assert "trial 0 starts" in said
    [item] = service.queue.items()
    assert dict(item.arguments.flags)["--model"] == str(tmp_path / "data" / "llama")
    outcome = [ItemState.FAILED]
    assert "it hit a wall" in autosft(capsys, "tune", code=1)
    outcome = [ItemState.CANCELLED]
    autosft(capsys, "tune", code=130)
    outcome = [ItemState.DONE]
    assert json.loads(autosft(capsys, "tune", "--json"))["state"] == "done"


def test_a_study_file_is_read_here_and_sent(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    Path("study.yaml").write_text("trials: 7\nlearning_rate: 1e-5..1e-3 log\nspace: {lora_rank: [8, 16]}\n")
    words = ("--server", SERVER, "--hold", "--", "tune", "--config", "study.yaml", "--trials", "9")
    assert cli.main(["submit", *words]) == 0
    [item] = service.queue.items()
    flags = dict(item.arguments.flags)
    assert (flags["--trials"], flags["--lora-rank"], flags["--learning-rate"]) == (
        "9",
        "8,16",
        "1e-5..1e-3 log",
    )
    assert item.state is ItemState.HELD


def test_a_best_yaml_is_sent_with_its_content(
    service: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from autosft.studies.export import as_yaml

    made = example_config(
        tmp_path / "made", model=str(tmp_path / "data/llama"), data=str(tmp_path / "data/chats.jsonl")
    )
    Path("mine.yaml").write_text(as_yaml(made))
    assert cli.main(["submit", "--server", SERVER, "--", "train", "mine.yaml"]) == 0
    [item] = service.queue.items()
    assert Path(item.arguments.positional[0]).read_text() == as_yaml(made)


BATCH = """
defaults: {model: llama, data: chats.jsonl, trials: 4}
studies:
  - {name: first, learning_rate: 1e-4}
  - {name: second, after: first, not_before: "+2h", priority: 3}
  - {name: third, trials: 8, hold: true}
"""


def test_a_batch_is_queued_once_however_often_it_is_sent(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("night.yaml").write_text(BATCH)
    for _ in range(2):
        assert cli.main(["submit", "--server", SERVER, "--batch", "night.yaml", "--json"]) == 0
    first, second, third = service.queue.items()
    assert [item.name for item in (first, second, third)] == ["first", "second", "third"]
    assert (second.after, second.priority) == ((first.id,), 3)
    assert second.not_before is not None
    assert dict(third.arguments.flags)["--trials"] == "8"
    assert third.state is ItemState.HELD


def test_the_queue_on_the_command_line(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(SERVER) as asking:
        for name in ("first", "second"):
            asking.submit("tune", {"trials": 4}, name=name)
    said = autosft(capsys, "queue")
    assert "first" in said
    assert "8.1 GiB free" in " ".join(said.split())
    assert autosft(capsys, "queue", "move", "second", "1", "--quiet").strip() == "2"
    assert "second: It is held" in autosft(capsys, "queue", "hold", "second")
    assert "second: Place" in autosft(capsys, "queue", "release", "second")
    assert json.loads(autosft(capsys, "queue", "priority", "first", "-5", "--json"))["priority"] == -5
    assert "cancelled" in autosft(capsys, "queue", "cancel", "first")
    assert "needs" not in autosft(capsys, "queue", "show", "second", "--quiet")
    assert (
        cli.main(["queue", "clone", "second", "--name", "third", "--server", SERVER, "--", "--trials", "9"])
        == 0
    )
    assert dict(service.queue.items()[-1].arguments.flags)["--trials"] == "9"


def test_studies_of_a_server(service: Service, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Client(SERVER) as asking:
        number = asking.submit("tune", {}, name="study")["id"]
    run(service, service.queue.get(number))
    example_study(service.records, service.limits.outputs / "root")
    service.clock = lambda: 10.0
    assert "study" in autosft(capsys, "studies", "list", "--quiet")
    assert json.loads(autosft(capsys, "studies", "show", "study", "--json"))["metric"] == "eval_loss"
    assert "takes effect" in autosft(capsys, "studies", "pause", "study", "--trial", "1")
    assert "takes effect" in autosft(capsys, "studies", "enqueue", "study", "--learning-rate", "3e-4")
    autosft(capsys, "report", "study", "--output", "r.html")
    assert "Best configuration" in Path("r.html").read_text()
    autosft(capsys, "export", "study", "--output", "b.yaml")
    assert "study: study" in Path("b.yaml").read_text()
    assert "best.yaml" in autosft(capsys, "queue", "files", "study")
    autosft(capsys, "queue", "files", "study", "--get", "best.yaml", "--output", "got.yaml")
    assert Path("got.yaml").read_text() == "format: 1\n"
    assert "of a server" in autosft(capsys, "export", "study", "--format", "trl", code=2)


def test_a_plan_of_a_server(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.planner.answers = lambda question: FITS
    assert json.loads(autosft(capsys, "plan", "--model", "Llama-3.1-8B", "--json")) == FITS
    assert "A100-80GB" in autosft(capsys, "plan", "--model", "Llama-3.1-8B")
    assert "not asked of a server" in autosft(capsys, "plan", "--model", "x", "--what-gpu", code=2)


WRONG = {
    "no server": (["queue", "--server", "http://127.0.0.1:1"], "No server answers"),
    "no URL": (["queue", "--server", "ftp://x"], "not a URL"),
    "neither cluster nor server": (["submit", "--", "tune"], "Neither a cluster nor a server"),
    "a command that is not queued": (["submit", "--server", SERVER, "--", "chat", "x"], "cannot be queued"),
    "a time that is none": (
        ["submit", "--server", SERVER, "--not-before", "soon", "--", "tune"],
        "not a time",
    ),
    "an unknown flag": (["submit", "--server", SERVER, "--", "tune", "--trialss", "3"], "trialss"),
    "fits nowhere": (["submit", "--server", SERVER, "--", "tune"], "needs 58 GiB"),
    "the queue's flags on a cluster": (["submit", "--address", "x:1", "--hold", "--", "tune"], "--server"),
    "no item": (["queue", "cancel", "77", "--server", SERVER], "no item 77"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_one_message_and_code_2(
    service: Service, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    words, said = WRONG[case]
    service.planner.answers = lambda question: prediction(refusal="needs 58 GiB")
    if case == "no server":
        monkeypatch.undo()
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


TIMES = {
    "later today": ("18:30", (18, 30), 0),
    "tomorrow": ("8:05", (8, 5), 1),
    "in full": ("2027-01-02 03:04", (3, 4), None),
}


@pytest.mark.parametrize("case", TIMES)
def test_a_time_is_the_next_of_that_hour(case: str) -> None:
    from datetime import datetime

    text, clock, days = TIMES[case]
    now = datetime(2026, 11, 30, 12, 0).astimezone()
    at = datetime.fromtimestamp(time_of(text, now=now.timestamp())).astimezone()
    assert (at.hour, at.minute) == clock
    if days is not None:
        assert (at.date() - now.date()).days == days
    assert time_of("+2h", now=1000.0) == 8200.0
