"""Who has written sees it at once, though the picture of the queue is made a second later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from autosft.service.api import models
from autosft.service.api.context import Service
from autosft.service.api.shown import shown_item
from autosft.service.board import Board
from tests.service.api.fakes import ADA, BOB, ROOT, client, served, tokens

TUNE = {"command": "tune", "arguments": {"model": "llama", "data": "chats.jsonl", "trials": 4}}


class Late:
    """A scheduler whose picture is that of its last look."""

    def __init__(self, of: Any) -> None:
        self._of = of
        self._board: Board = of.board()
        self.wake, self.is_alive = of.wake, of.is_alive

    def board(self) -> Board:
        return self._board

    def look(self) -> None:
        self._of.now += 1.0
        self._board = self._of.board()


@pytest.fixture
def late(tmp_path: Path) -> Iterator[tuple[Service, Late]]:
    with served(tmp_path) as service:
        (tmp_path / "data" / "chats.jsonl").write_text("{}")
        (tmp_path / "data" / "llama").mkdir()
        of = service.scheduler
        of.now -= 0.5
        service.scheduler = late = Late(of)
        yield service, late


def listed(who: Any, **asked: str) -> list[tuple[str, str]]:
    return [(item["name"], item["state"]) for item in who.get("/studies", params=asked).json()["items"]]


CHANGES: dict[str, tuple[Callable[[Any, int], Any], list[tuple[str, str]]]] = {
    "hold": (lambda who, item: who.post(f"/studies/{item}/hold"), [("b", "waiting"), ("a", "held")]),
    "cancel": (lambda who, item: who.post(f"/studies/{item}/cancel"), [("b", "waiting"), ("a", "cancelled")]),
    "clone": (
        lambda who, item: who.post(f"/studies/{item}/clone", json={"name": "c"}),
        [("a", "waiting"), ("b", "waiting"), ("c", "waiting")],
    ),
}


def test_a_submission_is_listed_at_once_for_its_owner(late: tuple[Service, Late]) -> None:
    service, scheduler = late
    known = tokens(service, ADA, BOB, ROOT)
    ada, bob, root = (client(service, known[name]) for name in ("ada", "bob", "root"))
    assert listed(ada) == []
    ada.post("/studies", json=TUNE | {"name": "a"})
    ada.post("/studies", json=TUNE | {"name": "b"})
    assert listed(ada) == [("a", "waiting"), ("b", "waiting")]
    assert listed(ada, state="held") == []
    assert listed(bob) == listed(root) == []
    scheduler.look()
    assert listed(ada) == listed(root) == [("a", "waiting"), ("b", "waiting")]
    assert listed(bob) == []
    assert not service.written._by_user  # nothing is kept that the picture has


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_listed_at_once_for_who_has_made_it(late: tuple[Service, Late], name: str) -> None:
    service, scheduler = late
    ada = client(service, tokens(service, ADA)["ada"])
    item = ada.post("/studies", json=TUNE | {"name": "a"}).json()["id"]
    ada.post("/studies", json=TUNE | {"name": "b"})
    scheduler.look()
    service.clock = lambda: scheduler.board().at + 0.5
    change, expected = CHANGES[name]
    assert change(ada, item).status_code in (200, 201)
    assert listed(ada) == expected
    scheduler.look()
    assert listed(ada) == expected


def test_a_list_is_put_together_from_its_items_as_it_would_be_made_in_one(late: tuple[Service, Late]) -> None:
    service, scheduler = late
    ada = client(service, tokens(service, ADA)["ada"])
    for name in ("a", "b"):
        ada.post("/studies", json=TUNE | {"name": name})
    scheduler.look()
    board = scheduler.board()
    made = models.Listed(items=[shown_item(item, board) for item in board.items], total=2, at=board.at)
    for _ in range(2):
        assert ada.get("/studies").text == made.model_dump_json()
        assert ada.get("/studies", params={"limit": 1}).json()["items"] == [
            made.model_dump(mode="json")["items"][0]
        ]
