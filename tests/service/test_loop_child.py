"""The scheduler's process is started, listened to, started again when it dies, and ends with its parent."""

from __future__ import annotations

import io
import queue
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from autosft.profiles.child_python import python
from autosft.profiles.errors import UserError
from autosft.service import loop_child, loop_process
from autosft.service.board import Board
from autosft.service.loop_child import ALIVE_S, LoopChild, SchedulerDiedError
from autosft.service.loop_process import ORPHANED, Work
from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.store.server_lease import ServedElsewhereError
from autosft.studies.values import Driver
from tests.service.examples import submission
from tests.service.loop_child_script import NOW

WAIT_S = 120.0
ROOT = Path(__file__).parents[2]


class Told:
    """What a child has told, as it comes."""

    def __init__(self) -> None:
        self.boards: queue.Queue[Board] = queue.Queue()
        self.trials: queue.Queue[Any] = queue.Queue()

    def next_items(self) -> list[tuple[int, str]]:
        """Wait for the next picture."""
        return [(item.id, item.note) for item in self.boards.get(timeout=WAIT_S).items]


@contextmanager
def child(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *lives: list[str]
) -> Iterator[tuple[LoopChild, Told, list[float]]]:
    monkeypatch.setattr(loop_child, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    told, now = Told(), [NOW]
    made = LoopChild(
        python("-m", "tests.service.loop_child_script"),
        (folder, lives),
        clock=lambda: now[0],
        publish=told.boards.put,
        tell_trial=lambda owner, data: told.trials.put((owner, data)),
    )
    try:
        yield made, told, now
    finally:
        made.end(checkpoint=False)
        assert made.pid is None


def test_its_picture_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with child(tmp_path, monkeypatch, ["picture 1", "hear 2", "trial 3", "live"]) as (made, told, now):
        assert not made.is_alive()
        made.begin()
        assert told.next_items() == [(1, "")]
        assert [item.id for item in made.board().items] == [1]
        assert made.is_alive()
        made.wake()
        assert told.next_items() == [(2, "wake")]
        assert told.trials.get(timeout=WAIT_S) == ("ann", {"trial": 3})
        now[0] += ALIVE_S
        assert not made.is_alive()  # it lives, and looks at nothing


def test_one_that_dies_alone_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives = (["picture 1", "hear 2", "die"], ["die"], ["refuse"], ["picture 3", "live"])
    with child(tmp_path, monkeypatch, *lives) as (made, told, _):
        made.begin()
        first = made.pid
        made.wake()
        assert [told.next_items() for _ in range(3)] == [[(1, "")], [(2, "wake")], [(3, "")]]
        assert made.is_alive()
        assert made.pid not in (None, first)
        assert made.num_restarts == 3


def test_a_drained_one_stays_drained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lives = (["picture 1", "hear 2", "die"], ["picture 3", "hear 4", "live"])
    with child(tmp_path, monkeypatch, *lives) as (made, told, _):
        made.begin()
        assert told.next_items() == [(1, "")]
        made.drain()
        assert told.boards.get(timeout=WAIT_S).is_draining
        assert [told.next_items() for _ in range(3)] == [[(2, "drain")], [(3, "")], [(4, "drain")]]
        assert made.board().is_draining


REFUSALS = {
    "a device that is not there": ("refuse", UserError, "no device"),
    "another server": ("elsewhere", ServedElsewhereError, "process 7"),
    "a bug": ("die", SchedulerDiedError, "code 9"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_keeps_it_from_serving_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    step, kind, said = REFUSALS[case]
    with (
        child(tmp_path, monkeypatch, [step]) as (made, _, _),
        pytest.raises((UserError, SchedulerDiedError), match=said) as raised,
    ):
        made.begin()
    assert type(raised.value) is kind


def test_one_that_was_replaced_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with child(tmp_path, monkeypatch, ["picture 1", "elsewhere"], ["picture 2"]) as (made, _, _):
        made.begin()
        assert made.replaced.wait(WAIT_S)
        made._thread.join(WAIT_S)
        assert not made.is_alive()
    assert len(list(tmp_path.iterdir())) == 1


COMMANDS = {False: "keep", True: "checkpoint"}


@pytest.mark.parametrize("checkpoint", COMMANDS)
def test_it_is_told_how_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: bool) -> None:
    with child(tmp_path, monkeypatch, ["picture 1", "hear 2"]) as (made, told, _):
        made.begin()
        made.end(checkpoint=checkpoint)
        assert [told.next_items() for _ in range(2)] == [[(1, "")], [(2, COMMANDS[checkpoint])]]
        assert made.num_restarts == 0


# The real one, over fakes


@pytest.mark.parametrize(("said", "exits"), [(b"", [ORPHANED]), (b"keep\n", []), (b"checkpoint\n", [])])
def test_the_end_of_its_input_is_its_own(
    monkeypatch: pytest.MonkeyPatch, said: bytes, exits: list[int]
) -> None:
    """At once, whatever it does: it would decide beside the next server otherwise."""
    found: list[int] = []
    monkeypatch.setattr(loop_process.os, "_exit", found.append)
    Work(None, None)._hear(io.BytesIO(said))  # type: ignore[arg-type]
    assert found == exits


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[QueueStore, subprocess.Popen[bytes], int]]:
    """A parent process of its own, and its scheduler's process, which has become the queue's server."""
    url = f"sqlite:///{tmp_path}/studies.db"
    opened = open_queue(url)
    command = [sys.executable, "-m", "tests.service.parent_script", url, str(tmp_path)]
    parent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    yield opened, parent, int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    opened.close()


def test_it_ends_with_its_parent_and_the_next_one_takes_over(
    served: tuple[QueueStore, subprocess.Popen[bytes], int],
) -> None:
    opened, parent, pid = served
    orphan = psutil.Process(pid)
    before = opened.server()
    assert before is not None
    assert before.process.pid == pid
    with pytest.raises(ServedElsewhereError):
        opened.take_over(Driver.current(), now=before.heartbeat_at)
    parent.kill()
    parent.wait()
    psutil.wait_procs([orphan], timeout=WAIT_S)
    assert opened.take_over(Driver.current(), now=before.heartbeat_at) == 2


def test_it_is_replaced_when_it_is_killed_and_nothing_is_lost(
    served: tuple[QueueStore, subprocess.Popen[bytes], int],
) -> None:
    opened, parent, pid = served
    item, _ = opened.submit(submission("kept"), now=1.0)
    psutil.Process(pid).kill()
    assert parent.stdout is not None
    after = int(parent.stdout.readline())
    assert after != pid
    server = opened.server()
    assert server is not None
    assert (server.process.pid, server.ended_at) == (after, None)
    assert opened.get(item.id).state.value == "waiting"
    assert parent.stdin is not None
    parent.stdin.close()  # told to end
    assert parent.wait(WAIT_S) == 0
    left = opened.server()
    assert left is not None
    assert left.ended_at is not None
