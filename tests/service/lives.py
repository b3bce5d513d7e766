"""Servers of a queue one after another, killed wherever a test wants, over a world that goes on."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from autosft.service.decide.outcomes import Ended
from autosft.service.drivers.protocol import Life, Progress
from autosft.service.loop import Loop
from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.values import Device, Item, ItemState
from autosft.studies.values import Driver
from tests.service.fake_drivers import HOST, FakeDevices, FakeDrivers, World

S = ItemState


class Killed(BaseException):
    """The server is killed here."""


class Mortality:
    """Counts what a server does that others see, and kills it before or after one of these."""

    def __init__(self) -> None:
        self.left: int | None = None  # steps until it is killed; None: it lives
        self.num_steps = 0
        self.is_server = False

    def step(self) -> None:
        if not self.is_server:
            return
        self.num_steps += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Killed

    def install(self, queue: QueueStore) -> None:
        dialect = queue._engine.dialect
        dialect.do_commit = functools.partial(self._commit, dialect.do_commit)  # type: ignore[method-assign]

    def _commit(self, commit: Callable[[Any], None], connection: Any) -> None:
        try:
            self.step()
        except Killed:  # as the database does for a process that is gone
            connection.rollback()
            raise
        commit(connection)
        self.step()


class MortalDrivers:
    """Drivers whose server may be killed before or after everything that it asks of them."""

    def __init__(self, drivers: FakeDrivers, mortality: Mortality) -> None:
        self._drivers = drivers
        self._mortality = mortality

    def start(self, item: Item, devices: Sequence[Device]) -> None:
        self._mortality.step()
        self._drivers.start(item, devices)
        self._mortality.step()

    def poll(self, item: Item, *, now: float) -> Life | Ended:
        return self._drivers.poll(item, now=now)

    def stop(self, item: Item) -> None:
        self._mortality.step()
        self._drivers.stop(item)
        self._mortality.step()

    def kill(self, item: Item) -> None:
        self._mortality.step()
        self._drivers.kill(item)

    def progress(self, item: Item, *, now: float) -> Progress | None:
        return self._drivers.progress(item, now=now)


@dataclass
class Lives:
    """A queue, its world, and the server that lives now."""

    url: str
    world: World
    mortality: Mortality = field(default_factory=Mortality)
    num_servers: int = 0
    num_killed: int = 0

    def __post_init__(self) -> None:
        self.queue = open_queue(self.url)  # of the servers
        self.mortality.install(self.queue)
        self.loop: Loop | None = None

    def tick(self) -> None:
        """Let the server look once, after starting one if there is none."""
        self.mortality.is_server = True
        try:
            if self.loop is None:
                self.loop = self._server()
            self.loop.tick()
        except Killed:
            self.num_killed += 1
            self.loop = None
        finally:
            self.mortality.is_server = False

    def _server(self) -> Loop:
        self.num_servers += 1
        drivers = MortalDrivers(FakeDrivers(self.world), self.mortality)
        made = Loop(
            self.queue,
            devices=FakeDevices(self.world),
            drivers=drivers,
            clock=self.world.clock,
            forecast_every_s=None,
        )
        self.world.advance(61.0)  # a dead server of this fake host is replaced once it is silent
        made.begin(Driver(host=HOST, pid=self.num_servers, pid_started_at=0.0))
        return made

    def pass_time(self, rng: random.Random) -> None:
        """Let time pass until something happens, or a little."""
        next_at = self.world.next_at()
        wait = rng.choice([0.5, 1.0, 7.0])
        self.world.advance(
            wait if next_at is None or rng.random() < 0.4 else max(0.0, next_at - self.world.now)
        )
        self.check()

    def check(self) -> None:
        """What holds at every moment."""
        for item in self.world.queue.items():
            working = self.world.running(item.id)
            assert len(working) <= 1, f"item {item.id} runs twice"
            if working:
                assert item.is_placed, f"item {item.id} is {item.state.value} and runs"
                assert item.launch == working[0].launch
        booked: dict[str, int] = {}
        for item in self.world.queue.items():
            if item.place is not None:
                assert item.is_placed
                for uuid in item.place.device_uuids:
                    booked[uuid] = booked.get(uuid, 0) + item.place.bytes_each
        sizes = {device.uuid: device.usable_bytes for device in self.world.devices}
        assert all(taken <= sizes[uuid] for uuid, taken in booked.items())
