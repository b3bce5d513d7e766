"""Notices are sent of what matters, and whatever becomes of them the study goes on."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler.events import NewBest, Note, StudyEvent, TrialEnded
from autosft.scheduler.observers.notifications import MAX_PENDING, Notice, Notifier, notifying, sender
from autosft.studies.trial import TrialState
from tests.cli.study_script import OPENED, record


class Receiver:
    """Keeps what is sent; holds every sending until it is let go."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.may_go_on = threading.Event()
        self.is_sending = threading.Event()

    def __call__(self, notice: Notice) -> None:
        self.is_sending.set()
        self.may_go_on.wait(10)
        self.notices.append(notice)


def best(value: float, trial: int = 3) -> NewBest:
    return NewBest(trial=trial, value=value, step=20)


def test_news_are_sent_in_order_and_events_passed_on() -> None:
    receiver, seen = Receiver(), []
    receiver.may_go_on.set()
    notifier = Notifier(receiver, seen.append)
    events: list[StudyEvent] = [
        OPENED,
        TrialEnded(record=record(1, TrialState.COMPLETED)),
        TrialEnded(record=record(2, TrialState.FAILED, message="broken data")),
    ]
    for event in events:
        notifier(event)
    notifier.end("ended", failed=False)
    notifier.close()
    assert seen == events
    assert [(notice.event, notice.text) for notice in receiver.notices] == [
        ("failure", "autosft demo: trial 2 failed: broken data"),
        ("end", "autosft demo: ended, 1 of 12 trials"),
    ]


def test_a_slow_receiver_delays_nothing_and_gets_only_the_last_best() -> None:
    receiver = Receiver()
    notifier = Notifier(receiver, lambda event: None)
    notifier(OPENED)
    notifier(best(2.0))
    assert receiver.is_sending.wait(60)
    for value in range(3 * MAX_PENDING):
        notifier(best(1.0 - value / 1000))  # returns at once: nobody has taken the first yet
        notifier(TrialEnded(record=record(2, TrialState.FAILED)))
    receiver.may_go_on.set()
    notifier.close()
    values = [notice.facts["value"] for notice in receiver.notices if notice.event == "new best"]
    assert values[0] == 2.0
    assert len(values) <= 2
    assert len(receiver.notices) <= MAX_PENDING + 1


def test_a_receiver_that_fails_is_reported_once() -> None:
    tried = threading.Semaphore(0)

    def send(notice: Notice) -> None:
        tried.release()
        raise ConnectionError("nobody there")

    seen: list[StudyEvent] = []
    notifier = Notifier(send, seen.append)
    notifier(best(1.0))
    assert tried.acquire(timeout=60)
    notifier.close()  # the thread has noted the trouble by now
    notifier(OPENED)
    notifier(OPENED)
    notes = [item.message for item in seen if isinstance(item, Note)]
    assert notes == ["--notify failed: ConnectionError: nobody there. The study continues."]


def test_the_end_is_reported_even_if_it_is_an_error(tmp_path: Path) -> None:
    target = f"{sys.executable} {tmp_path / 'receive.py'} {tmp_path / 'got.jsonl'}"
    (tmp_path / "receive.py").write_text(
        "import sys; open(sys.argv[1], 'a').write(sys.stdin.read() + '\\n'); assert sys.argv[2]"
    )

    def run() -> None:
        with notifying(target, lambda event: None) as observe:
            observe(OPENED)
            observe(best(0.5))
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        run()
    sent = [json.loads(line) for line in (tmp_path / "got.jsonl").read_text().splitlines()]
    assert [item["event"] for item in sent] == ["new best", "failure"]
    assert sent[0] | {"trial": 3, "value": 0.5, "step": 20, "study": "demo"} == sent[0]
    assert sent[1]["text"].startswith("autosft demo: failed: disk full")


def test_without_a_target_the_observer_is_the_observer() -> None:
    def observe(event: StudyEvent) -> None:
        pass

    with notifying(None, observe) as given:
        assert given is observe


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, object]]]]:
    got: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/hook", got
    httpd.shutdown()
    httpd.server_close()


def test_a_webhook_is_posted_json(server: tuple[str, list[dict[str, object]]]) -> None:
    url, got = server
    with notifying(url, lambda event: None) as observe:
        observe(OPENED)
    [posted] = got
    assert posted["event"] == "end"
    assert posted["text"] == posted["content"] == "autosft demo: ended, 0 of 12 trials"


WRONG = {
    "no host": ("https:///x", "has no host"),
    "no such command": ("certainly-not-a-command x", "no such command"),
    "broken quotes": ("echo 'x", "No closing quotation"),
    "nothing": (" ", "no such command"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_target_that_cannot_be_is_refused(case: str) -> None:
    target, said = WRONG[case]
    with pytest.raises(UserError, match=said):
        sender(target)
