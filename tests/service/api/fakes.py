"""A service without devices, without drivers and without a planner's process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from autosft.commands.service_flags import TyperCommandLine
from autosft.profiles.errors import UserError
from autosft.service.api.app import create_app
from autosft.service.api.context import Service
from autosft.service.board import Board, DeviceUse, board_of
from autosft.service.requests.limits import Limits
from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.values import (
    ENDED_STATES,
    OPEN_STATES,
    Demand,
    Item,
    Reason,
    Role,
    User,
)
from autosft.studies.store.records import open_records
from autosft.studies.wire import to_plain
from tests.service.examples import GIB, device, place, process, way

HOST = "127.0.0.1:8090"
NOW = 1_700_000_000.0
ADA, BOB, ROOT = User(name="ada"), User(name="bob"), User(name="root", role=Role.ADMIN)


FITS = {
    "fits": True,
    "model": "Llama-3.1-8B",
    "num_parameters": 8_030_261_248,
    "data": None,
    "seq_len": 1024,
    "num_train_examples": 30_000,
    "is_assumed": True,
    "device": "A100-80GB",
    "num_devices": 1,
    "usable_bytes": 80 * GIB,
    "methods": [],
}


class FakePlanner:
    """Answers what it is told, at once or when it is told to."""

    num_waiting = 0

    def __init__(self) -> None:
        self.answers: Callable[[Mapping[str, Any]], Any] = lambda question: prediction()
        self.is_slow = False
        self.asked: list[tuple[Mapping[str, Any], Future[Any]]] = []

    def ask(self, question: Mapping[str, Any], *, urgency: int = 1) -> Future[Any]:
        future: Future[Any] = Future()
        self.asked.append((question, future))
        if not self.is_slow:
            self.answer(len(self.asked) - 1)
        return future

    def answer(self, number: int = -1) -> None:
        question, future = self.asked[number]
        try:
            future.set_result(self.answers(question))
        except Exception as error:
            future.set_exception(error)


class FakeScheduler:
    """Everything waits in the order of its submission; `board` is made anew at each look."""

    def __init__(self, queue: QueueStore, devices: tuple[DeviceUse, ...] = ()) -> None:
        self.queue, self.devices, self.now = queue, devices, NOW
        self.num_wakes = 0
        self.alive = True
        self.is_draining = False
        self._board = Board()

    def board(self) -> Board:
        open_items = self.queue.items(OPEN_STATES)
        waits = tuple(
            (item.id, Reason(text="GPU 0 has 8.1 GiB free until about 14:20", starts_at=self.now + 600))
            for item in open_items
            if item.is_queued
        )
        self._board = board_of(
            open_items,
            self.queue.items(ENDED_STATES),
            waits,
            self.devices,
            now=self.now,
            is_draining=self.is_draining,
        )
        return self._board

    def wake(self) -> None:
        self.num_wakes += 1

    def is_alive(self) -> bool:
        return self.alive


def prediction(*, refusal: str = "", **changes: Any) -> dict[str, Any]:
    """Return what a planner says of an item."""
    made = None if refusal else to_plain(Demand(ways=(dataclasses.replace(way(), **changes),)))
    return {"demand": made, "refusal": refusal, "lines": []}


@contextmanager
def served(
    folder: Path, *, url: str | None = None, local_user: User | None = None, **changes: Any
) -> Iterator[Service]:
    """A service over a database of its own, with a folder of data that may be read."""
    data, outputs = folder / "data", folder / "outputs"
    for made in (data, outputs):
        made.mkdir(exist_ok=True)
    url = url or f"sqlite:///{folder}/studies.db"
    queue = open_queue(url)
    with closing(queue), closing(open_records(url)) as records:
        yield Service(
            **{
                "queue": queue,
                "records": records,
                "scheduler": FakeScheduler(queue),
                "planner": FakePlanner(),
                "limits": Limits(folders=(data,), outputs=outputs),
                "command_line": TyperCommandLine(),
                "spool": folder / "spool",
                "log_of": lambda item: folder / f"{item.id}.log",
                "local_user": local_user,
                "hosts": frozenset({HOST}),
                "clock": lambda: NOW,
                **changes,
            }  # type: ignore[arg-type]
        )


def tokens(service: Service, *users: User) -> dict[str, str]:
    """Add users; return their tokens by name."""
    return {user.name: service.queue.users.add(user, now=NOW) for user in users}


def client(service: Service, token: str | None = None) -> TestClient:
    """Return a client of the service, with a token."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    app = create_app(service)
    return TestClient(app, base_url=f"http://{HOST}", headers=headers, raise_server_exceptions=False)


def run(service: Service, item: Item) -> Item:
    """Have an item run."""
    queue = service.queue
    generation = queue.take_over(process(), now=NOW)
    queue.book(item.id, place(), launch=f"launch-{item.id}", generation=generation, now=NOW)
    claimed = queue.claim(item.id, launch=f"launch-{item.id}", process=process(item.id), now=NOW)
    assert claimed is not None
    return claimed


__all__ = [
    "ADA",
    "BOB",
    "FITS",
    "GIB",
    "HOST",
    "NOW",
    "ROOT",
    "FakePlanner",
    "FakeScheduler",
    "UserError",
    "client",
    "device",
    "prediction",
    "run",
    "served",
    "tokens",
]
