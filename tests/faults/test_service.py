"""Real servers of a queue are killed again and again: nothing is lost, and nothing runs twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from autosft.service.drivers.launch import OUT_OF_MEMORY_SCORE
from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.values import Arguments, Item, ItemState
from autosft.studies.values import state_if_running
from tests.service.examples import demand, submission, way

S = ItemState
NUM_DEVICES = 2


def start_server(url: str, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "server.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.service.server_script", url, str(folder), str(NUM_DEVICES)],
            stdout=log,
            stderr=log,
            cwd=Path(__file__).parents[2],
        )


def submit(queue: QueueStore, mode: str, key: str, **changes: object) -> Item:
    arguments = Arguments(command="tune", flags=(("--mode", mode),))
    given = submission(mode, arguments=arguments, demand=demand(way(seconds=9000.0)), **changes)
    return queue.submit(given, key=key, now=time.time())[0]


def until(is_so: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 300.0
    while not is_so():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def num_runs(folder: Path, item: Item) -> int:
    path = folder / f"work-{item.id}" / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [3, pytest.param(40, marks=pytest.mark.faults)])
def test_servers_that_are_killed_lose_nothing_and_start_nothing_twice(num_kills: int, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    queue, rng = open_queue(url), random.Random(num_kills)
    items: list[Item] = []
    server = start_server(url, tmp_path)
    try:
        for number in range(num_kills):
            mode = rng.choice(["done", "fails", "dies once", "waits once"])
            items.append(submit(queue, mode, f"key-{number}", priority=rng.choice([0, 0, 1])))
            num_events = len(queue.events())
            wanted = num_events + rng.randint(0, 4)
            until(lambda at=wanted: len(queue.events()) >= at or is_quiet(queue), tmp_path / "server.log")
            server.kill()
            server.wait()
            again = submit(queue, mode, f"key-{number}", priority=items[-1].priority)
            assert again.id == items[-1].id
            server = start_server(url, tmp_path)
        until(lambda: is_quiet(queue), tmp_path / "server.log")
        for item in queue.items({S.RUNNING}):  # those that wait until they are told to stop
            until(lambda one=item: num_runs(tmp_path, one) > 0, tmp_path / "server.log")
            queue.cancel(item.id, now=time.time())
        until(lambda: ended(queue, tmp_path), tmp_path / "server.log")
        found = queue.items()
        assert [item.id for item in found] == [item.id for item in items]
        for item in found:
            check(item, tmp_path)
    finally:
        server.terminate()
        server.wait()
        for item in queue.items():
            kill(item)
        queue.close()
    assert not [one for one in psutil.process_iter() if str(tmp_path) in " ".join(cmdline(one))]


#: Where memory is limited as containers do; needs root and version 1 of control groups.
GROUPS = Path("/sys/fs/cgroup/memory")
GROUP_MIB = 512


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of our own with little memory."""
    if not os.access(GROUPS / "cgroup.procs", os.W_OK):
        pytest.skip(f"needs a control group that limits memory ({GROUPS})")
    folder = GROUPS / f"autosft-greedy-{os.getpid()}"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text(str(GROUP_MIB << 20))
    yield folder
    until(lambda: not (folder / "cgroup.procs").read_text(), folder / "cgroup.procs")
    folder.rmdir()


@pytest.mark.slow
def test_a_driver_that_takes_all_memory_ends_itself_alone(group: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    queue, log = open_queue(url), tmp_path / "server.log"
    server = start_server(url, tmp_path)
    try:
        (group / "cgroup.procs").write_text(str(server.pid))  # what it starts is in it, too
        greedy = submit(queue, "greedy", "greedy")
        until(lambda: queue.get(greedy.id).is_ended, log)
        after = submit(queue, "done", "after")
        until(lambda: queue.get(after.id).is_ended, log)
        assert server.poll() is None
        assert queue.get(after.id).state is S.DONE
        found = queue.get(greedy.id)
        assert (found.state, found.num_starts) == (S.FAILED, 3)
        assert "was killed by signal 9, 3 times in a row" in found.note
        assert int((tmp_path / f"work-{greedy.id}" / "score").read_text()) >= OUT_OF_MEMORY_SCORE
        assert int(Path(f"/proc/{server.pid}/oom_score_adj").read_text()) < OUT_OF_MEMORY_SCORE
    finally:
        server.terminate()
        server.wait()
        queue.close()


def ended(queue: QueueStore, folder: Path) -> bool:
    """Whether all items have ended, after telling those that wait to stop."""
    for item in queue.items({S.RUNNING}):
        mode = dict(item.arguments.flags)["--mode"]
        if mode == "waits once" and num_runs(folder, item):
            queue.cancel(item.id, now=time.time())
    return all(item.is_ended for item in queue.items())


def is_quiet(queue: QueueStore) -> bool:
    """Whether nothing more will happen by itself: all have ended, or wait until they are told to stop."""
    open_items = [item for item in queue.items() if not item.is_ended]
    waits = [item for item in open_items if dict(item.arguments.flags)["--mode"] == "waits once"]
    running = [item for item in waits if item.state is S.RUNNING]
    return not open_items or len(running) >= NUM_DEVICES or (len(waits) == len(open_items) == len(running))


def check(item: Item, folder: Path) -> None:
    mode, runs = dict(item.arguments.flags)["--mode"], num_runs(folder, item)
    match mode:
        case "done":
            assert (item.state, runs) == (S.DONE, 1), item
        case "fails":
            assert (item.state, runs) == (S.FAILED, 1), item
        case "dies once":
            assert (item.state, runs) == (S.DONE, 2), item
        case "waits once":  # told to stop, or preempted and then done
            assert item.state in (S.CANCELLED, S.DONE), item
            assert runs <= item.num_starts
    launches = [line.split()[1] for line in (folder / f"work-{item.id}" / "runs").read_text().splitlines()]
    assert len(set(launches)) == len(launches)
    assert (item.place, item.process, item.launch) == (None, None, "")


def kill(item: Item) -> None:
    process = item.process
    if process is not None and state_if_running(process.pid, process.start_ticks or 0):
        os.kill(process.pid, 9)


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline() if process.pid != os.getpid() else []
    except psutil.Error:
        return []
