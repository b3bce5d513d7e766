"""The loop over fake drivers on a virtual clock, and over real processes: the same queue comes out."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from autosft.profiles.errors import UserError
from autosft.service import loop as loop_module
from autosft.service.drivers.command import DriverCommand
from autosft.service.drivers.process_drivers import ProcessDrivers, log_path
from autosft.service.loop import Loop
from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.store.server_lease import ServedElsewhereError
from autosft.service.values import Arguments, Device, Item, ItemState, Submission
from autosft.studies.values import Driver
from tests.service.examples import demand, device, place, submission, way
from tests.service.fake_drivers import HOST, FakeDevices, FakeDrivers, Script, World

S = ItemState
SCRIPT = Path(__file__).with_name("drivers_script.py")


class Rig(Protocol):
    """A queue and the servers on it, one after another."""

    queue: QueueStore
    loop: Loop

    def submit(self, mode: str, **changes: object) -> Item: ...
    def until(self, *wanted: tuple[Item, ItemState]) -> None:
        """Tick until these items are in these states."""

    def tick(self) -> None: ...
    def restart(self) -> None:
        """Kill the server and start another."""

    def num_runs(self, item: Item) -> int:
        """Return how often an item's work was begun."""


FAKES = {
    "done": Script(),
    "fails": Script(exit_code=1, seconds=5.0),
    "dies": Script(exit_code=None, seconds=5.0),
    "dies once": Script(dies_at=(20.0,)),
    "waits": Script(seconds=1e9),
    "waits once": Script(seconds=60.0),
    "hangs": Script(seconds=1e9, ignores_stop=True),
    "never claims": Script(claims=False),
}


class FakeRig:
    def __init__(self, url: str, num_devices: int) -> None:
        self.queue = open_queue(url)
        self.world = World(
            self.queue, lambda item: FAKES[self.modes[item]], devices=tuple(map(device, range(num_devices)))
        )
        self.modes: dict[int, str] = {}
        self.num_servers = 0
        self.loop = self._server()

    def _server(self) -> Loop:
        self.num_servers += 1
        made = Loop(
            self.queue,
            devices=FakeDevices(self.world),
            drivers=FakeDrivers(self.world),
            clock=self.world.clock,
        )
        self.world.advance(100.0)  # the one before sends no heartbeat any more
        made.begin(Driver(host=HOST, pid=self.num_servers, pid_started_at=0.0))
        return made

    def submit(self, mode: str, **changes: object) -> Item:
        item, _ = self.queue.submit(asked(mode, **changes), now=self.world.now)
        self.modes[item.id] = mode
        return item

    def tick(self) -> None:
        self.loop.tick()
        self.world.advance(1.0)

    def until(self, *wanted: tuple[Item, ItemState]) -> None:
        for _ in range(3000):
            self.tick()
            if all(self.queue.get(item.id).state is state for item, state in wanted):
                return
        raise AssertionError([self.queue.get(item.id) for item, _ in wanted])

    def restart(self) -> None:
        self.loop = self._server()

    def num_runs(self, item: Item) -> int:
        return len([ran for ran in self.world.ran if ran[0] == item.id])

    def close(self) -> None:
        self.queue.close()


def asked(mode: str, **changes: object) -> Submission:
    arguments = Arguments(command="tune", flags=(("--mode", mode),))
    given = {"arguments": arguments, "demand": demand(way(seconds=100.0)), **changes}
    return submission(mode, **given)


class FixedDevices:
    def __init__(self, num_devices: int) -> None:
        self.devices = tuple(map(device, range(num_devices)))

    def read(self, own_pids: object) -> tuple[Device, ...]:
        return self.devices


class ProcessRig:
    def __init__(self, url: str, num_devices: int, folder: Path) -> None:
        self.queue = open_queue(url)
        self.url = url
        self.folder = folder
        self.devices = FixedDevices(num_devices)
        self.loop = self._server()

    def _server(self) -> Loop:
        self.drivers = ProcessDrivers(self.folder / "items", database=self.url, command=self._command)
        made = Loop(self.queue, devices=self.devices, drivers=self.drivers, clock=time.time)
        made.begin(Driver.current())
        return made

    def _command(self, item: Item, devices: Sequence[Device]) -> DriverCommand:
        mode = dict(item.arguments.flags)["--mode"]
        if mode == "never claims":
            return DriverCommand(argv=("true",), environment={"PYTHONHOME": "/nowhere"})
        argv = (sys.executable, str(SCRIPT), mode, str(self.folder / f"work-{item.id}"))
        return DriverCommand(argv=argv, environment={"DEVICES": ",".join(one.uuid for one in devices)})

    def submit(self, mode: str, **changes: object) -> Item:
        return self.queue.submit(asked(mode, **changes), now=time.time())[0]

    def tick(self) -> None:
        self.loop.tick()
        time.sleep(0.05)

    def until(self, *wanted: tuple[Item, ItemState]) -> None:
        deadline = time.monotonic() + 240.0  # for a machine under load
        while time.monotonic() < deadline:
            self.tick()
            if all(self.queue.get(item.id).state is state for item, state in wanted):
                return
        raise AssertionError([self.queue.get(item.id) for item, _ in wanted])

    def restart(self) -> None:
        self.loop = self._server()

    def num_runs(self, item: Item) -> int:
        path = self.folder / f"work-{item.id}" / "runs"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def close(self) -> None:
        for item in self.queue.items():
            self.drivers.kill(item)
        self.queue.close()


@pytest.fixture(params=["fake", "process"])
def make_rig(
    request: pytest.FixtureRequest, sqlite_url: str, tmp_path: Path
) -> Iterator[Callable[[int], Rig]]:
    made: list[FakeRig | ProcessRig] = []

    def make(num_devices: int) -> Rig:
        is_fake = request.param == "fake"
        made.append(
            FakeRig(sqlite_url, num_devices) if is_fake else ProcessRig(sqlite_url, num_devices, tmp_path)
        )
        return made[0]

    yield make
    for rig in made:
        rig.close()


MakeRig = Callable[[int], Rig]


def test_items_run_to_their_end(make_rig: MakeRig) -> None:
    rig = make_rig(1)
    items = [rig.submit("done") for _ in range(2)]
    rig.until(*((item, S.DONE) for item in items))
    for item in items:
        ended = rig.queue.get(item.id)
        assert rig.num_runs(item) == 1
        assert (ended.place, ended.process, ended.launch, ended.num_starts, ended.note) == (
            None,
            None,
            "",
            1,
            "",
        )
        assert ended.device_s > 0
    first, second = (rig.queue.get(item.id) for item in items)
    assert first.ended_at is not None
    assert second.started_at is not None
    assert first.ended_at <= second.started_at  # one device
    assert rig.queue.usage(now=second.ended_at or 0.0, half_life_s=1e9)["ann"].decayed_s == pytest.approx(
        first.device_s + second.device_s, rel=0.01
    )


def test_a_failure_says_why_and_does_not_stop_the_next(make_rig: MakeRig) -> None:
    rig = make_rig(1)
    bad, good = rig.submit("fails"), rig.submit("done")
    rig.until((bad, S.FAILED), (good, S.DONE))
    assert rig.queue.get(bad.id).note.startswith(("error: bad.jsonl line 3", "exit 1"))
    assert rig.num_runs(bad) == 1


def test_what_follows_a_failure_is_held(make_rig: MakeRig) -> None:
    rig = make_rig(1)
    bad = rig.submit("fails")
    after = rig.submit("done", after=(bad.id,))
    rig.until((bad, S.FAILED), (after, S.HELD))
    assert rig.queue.get(after.id).note == f"It follows item {bad.id} (fails), which is failed."
    rig.queue.release(after.id, now=0.0)
    rig.until((after, S.HELD))  # it still follows it


def test_what_follows_another_starts_after_it(make_rig: MakeRig) -> None:
    rig = make_rig(2)
    first = rig.submit("done")
    second = rig.submit("done", after=(first.id,))
    rig.until((second, S.DONE))
    before, after = rig.queue.get(first.id), rig.queue.get(second.id)
    assert before.ended_at is not None
    assert after.started_at is not None
    assert before.ended_at <= after.started_at
    assert after.queued_at > after.submitted_at


def test_a_killed_driver_goes_on(make_rig: MakeRig) -> None:
    rig = make_rig(1)
    item = rig.submit("dies once")
    rig.until((item, S.DONE))
    assert rig.num_runs(item) == 2


def test_one_that_is_killed_again_and_again_has_failed(make_rig: MakeRig) -> None:
    rig = make_rig(1)
    item = rig.submit("dies")
    rig.until((item, S.FAILED))
    assert rig.num_runs(item) == 3
    assert "3 times in a row" in rig.queue.get(item.id).note


def test_one_that_never_begins_is_held(make_rig: MakeRig) -> None:
    rig = make_rig(1)
    item = rig.submit("never claims")
    rig.until((item, S.HELD))
    assert rig.num_runs(item) == 0
    assert rig.queue.get(item.id).num_starts == 3


def test_a_higher_priority_takes_the_device_and_the_other_goes_on(make_rig: MakeRig) -> None:
    rig = make_rig(1)
    low = rig.submit("waits once", demand=demand(way(seconds=9000.0)))
    rig.until((low, S.RUNNING))
    until_begun(rig, low)
    high = rig.submit("done", priority=1)
    rig.until((high, S.DONE), (low, S.DONE))
    told = [event.state for event in rig.queue.events(item=low.id)]
    assert told == [S.WAITING, S.STARTING, S.RUNNING, S.STOPPING, S.PREEMPTED, S.STARTING, S.RUNNING, S.DONE]
    assert (rig.num_runs(low), rig.num_runs(high)) == (2, 1)


def until_begun(rig: Rig, item: Item) -> None:
    """Wait until an item's work has begun: from then on it can be stopped with what it has done."""
    for _ in range(3000):
        if rig.num_runs(item):
            break
        rig.tick()
    for _ in range(8):
        rig.tick()


@pytest.mark.parametrize("ask", ["hold", "cancel"])
def test_a_running_item_is_stopped_by_its_owner(make_rig: MakeRig, ask: str) -> None:
    rig = make_rig(1)
    item, other = rig.submit("waits"), rig.submit("done")
    rig.until((item, S.RUNNING))
    until_begun(rig, item)
    then = S.HELD if ask == "hold" else S.CANCELLED
    getattr(rig.queue, ask)(item.id, now=0.0)
    rig.until((item, then), (other, S.DONE))


def test_one_that_does_not_stop_is_killed(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "KILL_AFTER_S", 1.0)
    rig = make_rig(1)
    item = rig.submit("hangs")
    rig.until((item, S.RUNNING))
    until_begun(rig, item)
    rig.queue.cancel(item.id, now=0.0)
    rig.until((item, S.CANCELLED))


def test_a_server_that_was_killed_is_replaced_and_nothing_runs_twice(make_rig: MakeRig) -> None:
    rig = make_rig(2)
    runs, waits, late = rig.submit("waits once"), rig.submit("waits"), rig.submit("done")
    rig.until((runs, S.RUNNING), (waits, S.RUNNING))
    until_begun(rig, runs)
    until_begun(rig, waits)
    before = rig.queue.items()
    rig.restart()
    assert rig.queue.items() == before
    rig.queue.cancel(waits.id, now=0.0)
    rig.until((waits, S.CANCELLED), (late, S.DONE))
    assert (rig.num_runs(waits), rig.num_runs(late)) == (1, 1)
    assert rig.num_runs(runs) == 1
    if rig.queue.get(runs.id).state is S.RUNNING:  # a process waits until it is told
        rig.queue.hold(runs.id, now=0.0)
        rig.until((runs, S.HELD))


def test_an_end_while_no_server_runs_is_found(make_rig: MakeRig) -> None:
    rig = make_rig(2)
    done, bad = rig.submit("done"), rig.submit("fails")
    rig.loop.tick()
    for item in (done, bad):
        assert rig.queue.get(item.id).state is S.STARTING
    if isinstance(rig, ProcessRig):
        for item in (done, bad):
            wait_for_exit(rig, rig.queue.get(item.id))
    else:
        assert isinstance(rig, FakeRig)
        rig.world.advance(1000.0)
    rig.restart()
    rig.until((done, S.DONE), (bad, S.FAILED))
    assert (rig.num_runs(done), rig.num_runs(bad)) == (1, 1)


def wait_for_exit(rig: ProcessRig, item: Item) -> str:
    path = rig.folder / "items" / f"{item.id:06d}" / f"exit-{item.launch}"
    deadline = time.monotonic() + 240.0
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text()


def test_a_start_without_a_process_is_made_again(make_rig: MakeRig) -> None:
    """The server was killed between its record of a start and the process."""
    rig = make_rig(1)
    item = rig.submit("done")
    generation = rig.loop._generation
    rig.queue.book(item.id, place(), launch="lost", generation=generation, now=0.0)
    rig.restart()
    assert rig.queue.get(item.id).state is S.WAITING
    rig.until((item, S.DONE))
    assert rig.num_runs(item) == 1


# Processes alone


@pytest.fixture
def processes(sqlite_url: str, tmp_path: Path) -> Iterator[ProcessRig]:
    rig = ProcessRig(sqlite_url, 2, tmp_path)
    yield rig
    rig.close()


def test_a_driver_knows_its_devices_and_its_log_is_kept(processes: ProcessRig) -> None:
    item = processes.submit("done", demand=demand(way(2)))
    processes.until((item, S.DONE))
    [run] = (processes.folder / f"work-{item.id}" / "runs").read_text().splitlines()
    assert run.split()[2] == "gpu-0,gpu-1"
    assert "running done" in log_path(processes.drivers.folder, item.id).read_text()


def test_a_driver_that_is_suspended_is_not_lost(processes: ProcessRig) -> None:
    item = processes.submit("waits")
    processes.until((item, S.RUNNING))
    until_begun(processes, item)
    identity = processes.queue.get(item.id).process
    assert identity is not None
    os.kill(identity.pid, signal.SIGSTOP)
    for _ in range(5):
        processes.tick()
    assert processes.queue.get(item.id).state is S.RUNNING
    os.kill(identity.pid, signal.SIGCONT)


def test_a_driver_that_comes_late_runs_nothing(processes: ProcessRig) -> None:
    """Its server was killed after the process was started; the next one withdraws the start."""
    item = processes.submit("done")
    booked = processes.queue.book(
        item.id, place(), launch="late", generation=processes.loop._generation, now=time.time()
    )
    processes.queue.withdraw(item.id, launch="late", now=time.time())
    processes.drivers.start(booked, processes.devices.devices[:1])
    assert wait_for_exit(processes, booked) == "75\n"
    assert processes.num_runs(item) == 0


# One server


def test_a_second_server_is_refused(sqlite_url: str, tmp_path: Path) -> None:
    rig = FakeRig(sqlite_url, 1)
    second = Loop(
        rig.queue, devices=FakeDevices(rig.world), drivers=FakeDrivers(rig.world), clock=rig.world.clock
    )
    with pytest.raises(ServedElsewhereError, match="process 1 on host"):
        second.begin(Driver(host="other", pid=9, pid_started_at=0.0))
    rig.world.advance(100.0)
    item = rig.submit("waits")
    second.begin(Driver(host="other", pid=9, pid_started_at=0.0))
    with pytest.raises(ServedElsewhereError):
        rig.loop.tick()
    assert rig.queue.get(item.id).state is S.WAITING
    rig.close()


def test_drivers_of_another_machine_are_not_taken_over(sqlite_url: str) -> None:
    rig = FakeRig(sqlite_url, 1)
    item = rig.submit("waits")
    rig.until((item, S.RUNNING))
    rig.world.advance(100.0)
    other = Loop(
        rig.queue, devices=FakeDevices(rig.world), drivers=FakeDrivers(rig.world), clock=rig.world.clock
    )
    with pytest.raises(UserError, match="runs on host, which cannot be watched"):
        other.begin(Driver(host="elsewhere", pid=9, pid_started_at=0.0))
    rig.restart()  # nobody serves it meanwhile
    assert rig.queue.get(item.id).state is S.RUNNING
    rig.close()
