"""Submitting, listing and moving items over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.service.api.context import Service
from autosft.service.values import ItemState
from tests.service.api.fakes import ADA, BOB, ROOT, client, prediction, run, served, tokens


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with served(tmp_path) as made:
        (tmp_path / "data" / "chats.jsonl").write_text("{}")
        (tmp_path / "data" / "llama").mkdir()
        yield made


TUNE = {"command": "tune", "arguments": {"model": "llama", "data": "chats.jsonl", "trials": 4}}


def test_a_submission_answers_with_its_place_and_what_is_predicted(service: Service) -> None:
    as_ada = client(service, tokens(service, ADA)["ada"])
    answer = as_ada.post("/studies", json=TUNE | {"name": "first"})
    assert answer.status_code == 201, answer.text
    shown = answer.json()
    assert (shown["name"], shown["owner"], shown["state"], shown["place"]) == ("first", "ada", "waiting", 1)
    assert shown["predicted"]["bytes_each"] == 10 << 30
    assert shown["reason"].startswith("GPU 0 has 8.1 GiB free")
    assert "--study=first" in shown["command_line"]
    assert f"--data={service.limits.folders[0]}/chats.jsonl" in shown["command_line"]
    assert f"--output={service.limits.outputs}/ada" in shown["command_line"]


def test_a_submission_does_not_wait_for_a_plan_that_is_not_known_yet(service: Service) -> None:
    as_ada = client(service, tokens(service, ADA)["ada"])
    service.planner.is_slow = True
    shown = as_ada.post("/studies", json=TUNE).json()
    assert (shown["is_planning"], shown["predicted"]) == (True, None)
    assert shown["reason"].startswith("planning")
    service.planner.answer()
    after = as_ada.get(f"/studies/{shown['id']}").json()
    assert (after["is_planning"], after["predicted"]["seconds"]) == (False, 3600.0)


FIT = "needs 58 GiB; would fit: --method lora"


@pytest.mark.parametrize("is_slow", [False, True])
def test_what_fits_nowhere_is_refused_with_what_would(service: Service, is_slow: bool) -> None:
    as_ada = client(service, tokens(service, ADA)["ada"])
    service.planner.is_slow = is_slow
    service.planner.answers = lambda question: prediction(refusal=FIT)
    answer = as_ada.post("/studies", json=TUNE)
    if not is_slow:
        assert (answer.status_code, answer.json()["error"]) == (422, FIT)
        assert service.queue.items() == ()
        return
    service.planner.answer()
    shown = as_ada.get(f"/studies/{answer.json()['id']}").json()
    assert (shown["state"], shown["note"]) == ("refused", FIT)


def test_a_planner_that_fails_holds_the_item_and_says_so(service: Service) -> None:
    from autosft.service.requests.planner import PlannerFailedError

    def fail(question: Any) -> None:
        raise PlannerFailedError("it ended with code -9")

    as_ada = client(service, tokens(service, ADA)["ada"])
    service.planner.is_slow, service.planner.answers = True, fail
    number = as_ada.post("/studies", json=TUNE).json()["id"]
    service.planner.answer()
    shown = as_ada.get(f"/studies/{number}").json()
    assert shown["state"] == "held"
    assert "code -9" in shown["note"]


def test_the_same_key_is_the_same_item_whatever_was_lost(service: Service) -> None:
    as_ada = client(service, tokens(service, ADA)["ada"])
    key = {"Idempotency-Key": "abc"}
    first, again = (as_ada.post("/studies", json=TUNE, headers=key) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]
    other = as_ada.post("/studies", json={"command": "tune"}, headers=key)
    assert other.status_code == 422
    assert len(service.queue.items()) == 1


def test_a_list_has_the_order_of_the_queue_and_only_what_one_may_see(service: Service) -> None:
    made = tokens(service, ADA, BOB, ROOT)
    as_ada, as_bob, as_root = (client(service, made[name]) for name in ("ada", "bob", "root"))
    names = ["one", "two", "three"]
    for each, name in zip((as_ada, as_bob, as_ada), names, strict=True):
        assert each.post("/studies", json={"name": name}).status_code == 201
    run(service, service.queue.items()[2])

    def seen(by: Any, **query: Any) -> list[str]:
        return [item["name"] for item in by.get("/studies", params=query).json()["items"]]

    assert seen(as_root) == ["three", "one", "two"]
    assert seen(as_ada) == ["three", "one"]
    assert seen(as_bob) == ["two"]
    assert seen(as_root, state="waiting") == ["one", "two"]
    assert seen(as_root, limit=1, offset=1) == ["one"]


ACTIONS = {
    "hold": (ItemState.WAITING, "hold", {"note": "until monday"}, "held"),
    "release": (ItemState.HELD, "release", None, "waiting"),
    "cancel": (ItemState.WAITING, "cancel", None, "cancelled"),
    "cancel what runs": (ItemState.RUNNING, "cancel", None, "stopping"),
    "hold what runs": (ItemState.RUNNING, "hold", None, "stopping"),
}


@pytest.mark.parametrize("case", ACTIONS)
def test_an_action_changes_the_state(service: Service, case: str) -> None:
    before, action, body, after = ACTIONS[case]
    as_ada = client(service, tokens(service, ADA)["ada"])
    number = as_ada.post("/studies", json={"hold": before is ItemState.HELD}).json()["id"]
    if before is ItemState.RUNNING:
        run(service, service.queue.get(number))
    answer = as_ada.post(f"/studies/{number}/{action}", json=body)
    assert (answer.status_code, answer.json()["state"]) == (200, after)
    if body:
        assert answer.json()["note"] == body["note"]


def test_what_has_ended_cannot_be_changed(service: Service) -> None:
    as_ada = client(service, tokens(service, ADA)["ada"])
    number = as_ada.post("/studies", json={}).json()["id"]
    as_ada.post(f"/studies/{number}/cancel")
    for action in ("cancel", "hold", "release"):
        assert as_ada.post(f"/studies/{number}/{action}").status_code == 409


def test_priority_above_zero_and_moving_are_for_admins(service: Service) -> None:
    made = tokens(service, ADA, ROOT)
    as_ada, as_root = client(service, made["ada"]), client(service, made["root"])
    numbers = [as_ada.post("/studies", json={}).json()["id"] for _ in range(3)]
    assert as_ada.post("/studies", json={"priority": 1}).status_code == 403
    for body, path in (({"priority": 5}, "priority"), ({"place": 1}, "move")):
        assert as_ada.post(f"/studies/{numbers[2]}/{path}", json=body).status_code == 403
        assert as_root.post(f"/studies/{numbers[2]}/{path}", json=body).status_code == 200
    assert as_ada.post(f"/studies/{numbers[1]}/priority", json={"priority": -5}).json()["priority"] == -5
    assert service.queue.get(numbers[2]).rank == 0


def test_a_clone_changes_what_is_given_and_keeps_the_rest(service: Service) -> None:
    as_ada = client(service, tokens(service, ADA)["ada"])
    first = as_ada.post("/studies", json=TUNE | {"name": "first"}).json()
    body = {"arguments": {"learning_rate": "1e-4", "trials": None}, "warm_start": True, "name": "second"}
    second = as_ada.post(f"/studies/{first['id']}/clone", json=body).json()
    assert second["cloned_from"] == first["id"]
    line = second["command_line"]
    assert "--learning-rate=1e-4" in line
    assert "--warm-start=first" in line
    assert "--study=second" in line
    assert "--trials" not in line
    assert f"--model={service.limits.folders[0]}/llama" in line


def test_a_clone_of_an_unknown_flag_is_refused_in_words(service: Service) -> None:
    as_ada = client(service, tokens(service, ADA)["ada"])
    first = as_ada.post("/studies", json=TUNE).json()
    answer = as_ada.post(f"/studies/{first['id']}/clone", json={"arguments": {"learning_rat": 1}})
    assert answer.status_code == 422
    assert answer.json()["remedy"] == "Did you mean learning_rate?"


def test_waiting_for_an_item_of_another_user_is_refused(service: Service) -> None:
    made = tokens(service, ADA, BOB)
    number = client(service, made["ada"]).post("/studies", json={}).json()["id"]
    as_bob = client(service, made["bob"])
    assert as_bob.post("/studies", json={"after": [number]}).status_code == 404


def test_a_name_of_another_users_study_is_taken(service: Service) -> None:
    made = tokens(service, ADA, BOB)
    client(service, made["ada"]).post("/studies", json={"name": "mine"})
    answer = client(service, made["bob"]).post("/studies", json={"name": "mine"})
    assert answer.status_code == 422
    assert "not yours" in answer.json()["error"]


def test_a_bug_is_said_to_be_one_and_not_shown(service: Service) -> None:
    as_ada = client(service, tokens(service, ADA)["ada"])

    def fail(question: Any) -> None:
        raise RuntimeError("secret")

    service.planner.ask = fail
    answer = as_ada.post("/studies", json={})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert UserError  # the same shape as every refusal
    assert set(answer.json()) == {"error", "remedy"}
