"""What a study has done, and what may be asked of it, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from autosft.service.api.context import Service
from autosft.studies.values import CommandKind
from tests.service.api.fakes import ROOT, client, run, served
from tests.service.api.studies import example_study


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with served(tmp_path, local_user=ROOT) as made:
        yield made


@pytest.fixture
def item(service: Service) -> int:
    number = int(client(service).post("/studies", json={"name": "study"}).json()["id"])
    run(service, service.queue.get(number))
    example_study(service.records, service.limits.outputs / "root")
    return number


@pytest.fixture
def by(service: Service) -> TestClient:
    return client(service)


def test_trials_are_listed_with_their_values(by: TestClient, item: int) -> None:
    found = by.get(f"/studies/{item}/trials").json()
    assert (found["study"], found["metric"], found["num_trials"]) == ("study", "eval_loss", 3)
    assert [(trial["number"], trial["state"], trial["value"]) for trial in found["trials"]] == [
        (0, "completed", 1.1),
        (1, "running", 1.2),
    ]


COMMANDS = {
    "pause a study": ("pause", CommandKind.PAUSE, None),
    "resume a study": ("resume", CommandKind.RESUME, None),
    "stop a study": ("stop", CommandKind.STOP, None),
    "pause a trial": ("trials/1/pause", CommandKind.PAUSE, 1),
    "stop a trial": ("trials/1/stop", CommandKind.STOP, 1),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_reaches_the_study(service: Service, by: TestClient, item: int, case: str) -> None:
    path, kind, trial = COMMANDS[case]
    service.clock = lambda: 10.0  # its driver's heartbeat is fresh
    answer = by.post(f"/studies/{item}/{path}")
    assert (answer.status_code, answer.json()["is_running"]) == (202, True), answer.text
    [command] = service.records.read_study("study").pending_commands()
    assert (command.kind, command.trial) == (kind, trial)


def test_settings_are_enqueued_as_values_of_the_search(service: Service, by: TestClient, item: int) -> None:
    answer = by.post(f"/studies/{item}/trials", json={"settings": {"learning-rate": "3e-4"}})
    assert answer.status_code == 202, answer.text
    [command] = service.records.read_study("study").pending_commands()
    assert dict(command.parameters) == {"learning_rate": 3e-4}
    wrong = by.post(f"/studies/{item}/trials", json={"settings": {"learning_rate": "1e-5..1e-3 log"}})
    assert (wrong.status_code, "single value" in wrong.json()["error"]) == (422, True)


REFUSED = {
    "a trial that is over": ("trials/0/stop", 422),
    "a trial that is not there": ("trials/7/stop", 422),
    "an action that is none": ("trials/1/explode", 422),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused(service: Service, by: TestClient, item: int, case: str) -> None:
    path, status = REFUSED[case]
    service.clock = lambda: 10.0
    assert by.post(f"/studies/{item}/{path}").status_code == status


def test_a_log_is_read_in_parts(service: Service, by: TestClient, item: int, tmp_path: Path) -> None:
    log = tmp_path / f"{item}.log"
    log.write_text("one\n")
    first = by.get(f"/studies/{item}/log").json()
    assert first == {"text": "one\n", "offset": 4, "is_complete": False}
    log.write_text("one\ntwo 🦙\n")
    assert by.get(f"/studies/{item}/log", params={"offset": 4}).json()["text"] == "two 🦙\n"
    assert by.get(f"/studies/{item}/log", params={"offset": 999}).json()["text"] == ""


def test_a_trials_log_is_that_of_its_last_attempt(by: TestClient, item: int) -> None:
    assert by.get(f"/studies/{item}/trials/0/log").json()["text"] == "step 1\nstep 2\n"
    assert by.get(f"/studies/{item}/trials/1/log").json()["text"] == ""
    assert by.get(f"/studies/{item}/trials/9/log").status_code == 404


def test_the_best_configuration_and_the_report(by: TestClient, item: int) -> None:
    exported = by.get(f"/studies/{item}/export")
    assert exported.headers["content-type"].startswith("application/yaml")
    assert "study: study" in exported.text
    report = by.get(f"/studies/{item}/report")
    assert "Best configuration" in report.text
    assert "sandbox" in report.headers["content-security-policy"]  # it cannot act as its reader


FILES = {
    "a file": ("best.yaml", 200),
    "below": ("trials/0000/attempt-1.log", 200),
    "up and out": ("%2e%2e/%2e%2e/%2e%2e/studies.db", 404),
    "in full": ("/etc/passwd", 404),
    "a folder": ("trials", 404),
    "a link out": ("out", 404),
    "not there": ("none", 404),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_those_below_the_items_folder(
    service: Service, by: TestClient, item: int, case: str
) -> None:
    path, status = FILES[case]
    (service.limits.outputs / "root" / "study" / "out").symlink_to("/etc/passwd")
    listed = by.get(f"/studies/{item}/artifacts").json()
    assert [file["path"] for file in listed["files"]] == ["best.yaml", "trials/0000/attempt-1.log"]
    answer = by.get(f"/studies/{item}/artifacts/{path}")
    assert answer.status_code == status
    if status == 200:
        assert answer.headers["content-type"] == "application/octet-stream"


def test_before_its_first_start_there_is_nothing_to_show(service: Service, by: TestClient) -> None:
    number = by.post("/studies", json={"name": "new"}).json()["id"]
    for path in ("trials", "report", "export", "artifacts", "trials/0/log"):
        assert by.get(f"/studies/{number}/{path}").status_code == 404, path
    assert by.get(f"/page/items/{number}").status_code == 200
