"""Health, figures, devices, events and plans over HTTP."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.service.api.context import Service, asking, service_of
from autosft.service.api.events import MAX_WAITING, Hub
from autosft.service.api.operations import require_room
from autosft.service.api.written import Answers
from autosft.service.board import Board, DeviceUse
from autosft.service.values import User
from tests.service.api.fakes import ADA, BOB, FITS, GIB, NOW, ROOT, client, device, run, served, tokens


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with served(tmp_path, local_user=ROOT) as made:
        yield made


def test_it_is_ready_while_the_queue_is_looked_at(service: Service) -> None:
    by = client(service)
    assert by.get("/healthz").json()["status"] == "ok"
    assert by.get("/readyz").status_code == 200
    service.scheduler.alive = False
    answer = by.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    service.scheduler.alive, service.scheduler.is_draining = True, True
    assert by.get("/readyz").json()["reasons"] == ["the server is stopping"]
    assert by.get("/healthz").status_code == 200  # it is not to be killed for that


def test_figures_say_what_waits_and_what_is_booked(service: Service) -> None:
    by = client(service)
    first = by.post("/studies", json={}).json()["id"]
    by.post("/studies", json={})
    run(service, service.queue.get(first))
    use = DeviceUse(device=device(0), booked=((first, 10),), measured=((first, 8),), free_bytes=GIB)
    service.scheduler.devices = (use,)
    text = by.get("/metrics").text
    assert 'autosft_items{state="waiting"} 1.0' in text
    assert 'autosft_items{state="running"} 1.0' in text
    assert 'autosft_device_booked_bytes{device="gpu-0",name="GPU"} 10.0' in text
    assert 'autosft_longest_wait_seconds{user="root"}' in text


def test_devices_name_only_what_one_may_see(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        made = tokens(service, ADA, BOB)
        item = client(service, made["ada"]).post("/studies", json={"name": "mine"}).json()["id"]
        service.scheduler.devices = (DeviceUse(device=device(0), booked=((item, GIB),)),)
        for name, seen in (("ada", "mine"), ("bob", "another user's")):
            [shown] = client(service, made[name]).get("/devices").json()["devices"]
            assert shown["predicted"] == [{"item": item, "name": seen, "num_bytes": GIB}]


def collected(hub: Hub, user: User, act: Any, num: int) -> list[tuple[str, dict[str, Any]]]:
    """Return what a listener hears of an act."""

    async def listen() -> list[tuple[str, dict[str, Any]]]:
        heard: list[tuple[str, dict[str, Any]]] = []
        stream = hub.listen(user)
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        act()
        while len(heard) < num:
            event = await asyncio.wait_for(task, 30)
            heard.append((event.kind, dict(event.data)))
            task = asyncio.ensure_future(anext(stream))
        task.cancel()
        return heard

    return asyncio.run(listen())


def test_events_reach_those_who_may_see_them(service: Service) -> None:
    item = service.queue.get(client(service).post("/studies", json={}).json()["id"])
    board = Board(at=NOW, items=(item,))
    for user, is_seen in ((ROOT, True), (ADA, False)):
        hub = Hub()

        def act(hub: Hub = hub) -> None:
            hub.publish(board)
            hub.tell("queue", None, {"length": 1})

        heard = collected(hub, user, act, 2 if is_seen else 1)
        assert [kind for kind, _ in heard] == (["item", "queue"] if is_seen else ["queue"])


def test_a_slow_listener_is_told_that_it_has_missed_something() -> None:
    hub = Hub()

    def act() -> None:
        for number in range(MAX_WAITING + 10):
            hub.tell("queue", None, {"length": number})

    heard = collected(hub, ROOT, act, MAX_WAITING + 1)
    assert heard[-1][0] == "missed"
    assert sum(kind == "queue" for kind, _ in heard) == MAX_WAITING


def test_an_ended_server_ends_its_streams() -> None:
    hub = Hub()

    async def listen() -> list[Any]:
        stream = hub.listen(ROOT)
        task = asyncio.ensure_future(anext(stream, None))
        await asyncio.sleep(0)
        hub.close()
        return [await asyncio.wait_for(task, 30), hub.num_listeners]

    assert asyncio.run(listen()) == [None, 0]


def test_a_plan_is_asked_for_and_answered(service: Service) -> None:
    asked: list[Any] = []

    def answer(question: Any) -> Any:
        asked.append(question)
        return FITS

    service.planner.answers = answer
    by = client(service)
    found = by.get("/fits", params={"model": "Llama-3.1-8B", "device": "A100-80GB", "seq_len": 1024})
    assert (found.status_code, found.json()) == (200, FITS)
    assert asked[0]["fits"]["device"] == "A100-80GB"


def test_a_plan_names_no_file_that_may_not_be_read(service: Service) -> None:
    by = client(service)
    for query in ({"model": "/etc"}, {"model": "llama", "data": "/etc/passwd"}):
        assert by.get("/fits", params=query).status_code == 422
    service.planner.answers = lambda question: (_ for _ in ()).throw(UserError("no such card", remedy="A100"))
    answer = by.get("/fits", params={"model": "Llama-3.1-8B", "device": "/etc/passwd.json"})
    assert answer.json() == {"error": "no such card", "remedy": "A100"}


def test_an_answer_is_made_once_for_each_picture_whoever_hangs_up() -> None:
    made: list[int] = []

    def make() -> str:
        made.append(len(made))
        return f"text {len(made)}"

    async def ask() -> list[str]:
        answers, board = Answers(), Board(at=NOW)
        first = asyncio.ensure_future(answers.get(board, "list", make))
        await asyncio.sleep(0)
        first.cancel()
        several = await asyncio.gather(*(answers.get(board, "list", make) for _ in range(3)))
        return [*several, await answers.get(Board(at=NOW + 1), "list", make)]

    assert asyncio.run(ask()) == ["text 1"] * 3 + ["text 2"]


def test_who_asks_is_found_without_a_thread() -> None:
    """A dependency that is a plain function costs each request a thread's turn."""
    assert all(map(inspect.iscoroutinefunction, (asking, service_of, require_room)))
