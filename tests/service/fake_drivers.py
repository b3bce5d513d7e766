"""Drivers on a virtual clock: scripted ends and faults, no process, no waiting.

The world goes on when a server is killed: what it has started claims its item and ends in its time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autosft.service.decide.outcomes import Ended
from autosft.service.drivers.protocol import Life, Progress
from autosft.service.store.queue_store import QueueStore
from autosft.service.values import Device, Item
from autosft.studies.values import Driver

HOST = "host"
CLAIM_S = 2.0
STOP_S = 5.0


@dataclass(slots=True)
class Script:
    """What an item's work is: how long it takes in all, and how it ends."""

    seconds: float = 100.0
    exit_code: int | None = 0  # None: it vanishes
    ignores_stop: bool = False
    claims: bool = True
    dies_at: tuple[float, ...] = ()  # of the work; each once


@dataclass(slots=True)
class FakeProcess:
    item: int
    launch: str
    pid: int
    began_at: float | None = None  # when it claimed its item
    ends_at: float = float("inf")
    ended: Ended | None = None
    is_gone: bool = False
    dies: bool = False  # this time, before its work is done


@dataclass
class World:
    """Processes, devices and their clock."""

    queue: QueueStore
    script: Callable[[int], Script] = lambda _: Script()
    now: float = 1_000_000.0
    devices: tuple[Device, ...] = ()
    processes: dict[str, FakeProcess] = field(default_factory=dict)
    worked_s: dict[int, float] = field(default_factory=dict)  # by item, kept over stops: its checkpoints
    ran: list[tuple[int, str, float]] = field(default_factory=list)  # item, launch, when it claimed
    deaths: dict[int, int] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)  # launches that were asked to stop
    next_pid: int = 100
    _due: list[tuple[float, str]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass, and what happens in it happen."""
        until = self.now + seconds
        while self._due and self._due[0][0] <= until:
            self.now, launch = heapq.heappop(self._due)
            self._happen(self.processes[launch])
        self.now = until

    def next_at(self) -> float | None:
        """Return when something happens next."""
        return self._due[0][0] if self._due else None

    def plan(self, process: FakeProcess, at: float) -> None:
        process.ends_at = at
        heapq.heappush(self._due, (at, process.launch))

    def spawn(self, item: Item) -> None:
        self.next_pid += 1
        process = FakeProcess(item=item.id, launch=item.launch, pid=self.next_pid)
        assert item.launch not in self.processes
        self.processes[item.launch] = process
        self.plan(process, self.now + CLAIM_S)

    def identity(self, process: FakeProcess) -> Driver:
        return Driver(host=HOST, pid=process.pid, pid_started_at=self.now)

    def running(self, item_id: int) -> list[FakeProcess]:
        """Return an item's processes that work at this moment."""
        return [
            one for one in self.processes.values() if one.item == item_id and one.began_at and not one.is_gone
        ]

    def _happen(self, process: FakeProcess) -> None:
        if process.is_gone or self.now < process.ends_at:
            return
        script = self.script(process.item)
        if process.began_at is not None:
            if process.launch in self.stopped:
                self._end(process, 130, is_killed=False)
            else:
                self._end(process, None if process.dies else script.exit_code, is_killed=process.dies)
            return
        if not script.claims:
            self._leave(process, None)
            return
        claimed = self.queue.claim(
            process.item, launch=process.launch, process=self.identity(process), now=self.now
        )
        if claimed is None:
            self._leave(process, None)
            return
        process.began_at = self.now
        self.ran.append((process.item, process.launch, self.now))
        done = self.worked_s.get(process.item, 0.0)
        num_deaths = self.deaths.get(process.item, 0)
        process.dies = num_deaths < len(script.dies_at)
        until = script.dies_at[num_deaths] if process.dies else script.seconds
        self.plan(process, self.now + max(1.0, until - done))

    def _end(self, process: FakeProcess, code: int | None, *, is_killed: bool) -> None:
        if is_killed:
            self.deaths[process.item] = self.deaths.get(process.item, 0) + 1
        worked = self.now - (process.began_at or self.now)
        self.worked_s[process.item] = self.worked_s.get(process.item, 0.0) + worked
        self._leave(
            process, Ended(exit_code=code, message=f"exit {code}", at=None if is_killed else self.now)
        )

    def _leave(self, process: FakeProcess, ended: Ended | None) -> None:
        process.is_gone = True
        process.ended = ended

    def signal(self, process: FakeProcess) -> None:
        if not self.script(process.item).ignores_stop:
            self._stop_at(process, self.now + STOP_S)

    def _stop_at(self, process: FakeProcess, at: float) -> None:
        if at < process.ends_at:
            process.dies = False
            process.ends_at = at
            heapq.heappush(self._due, (at, process.launch))
            self.stopped.add(process.launch)

    def kill(self, process: FakeProcess) -> None:
        if not process.is_gone:
            self._end(process, None, is_killed=False)


class FakeDrivers:
    """The drivers of one server: another one has none of its own, and finds these all the same."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._mine: set[str] = set()

    def start(self, item: Item, devices: Sequence[Device]) -> None:
        assert {device.uuid for device in devices} == {*(item.place.device_uuids if item.place else ())}
        self._mine.add(item.launch)
        self._world.spawn(item)

    def poll(self, item: Item, *, now: float) -> Life | Ended:
        process = self._world.processes.get(item.launch)
        if item.process is None:
            is_there = process is not None and not process.is_gone and item.launch in self._mine
            return Life.UNCLAIMED if is_there else Life.NONE
        assert process is not None
        if not process.is_gone:
            return Life.ALIVE
        return process.ended or Ended(exit_code=None)

    def stop(self, item: Item) -> None:
        self._world.signal(self._world.processes[item.launch])

    def kill(self, item: Item) -> None:
        self._world.kill(self._world.processes[item.launch])

    def progress(self, item: Item, *, now: float) -> Progress | None:
        process = self._world.processes[item.launch]
        script = self._world.script(item.id)
        worked = self._world.worked_s.get(item.id, 0.0) + now - (process.began_at or now)
        return Progress(
            share=min(1.0, worked / script.seconds), ends_at=now + max(0.0, script.seconds - worked)
        )


class FakeDevices:
    def __init__(self, world: World) -> None:
        self._world = world

    def read(self, own_pids: object) -> tuple[Device, ...]:
        return self._world.devices
