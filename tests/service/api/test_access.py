"""Every endpoint without a token, with another user's, with a revoked one; hosts and origins."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from autosft.service.api import context
from autosft.service.api.context import Service
from autosft.service.api.guard import Guard
from tests.service.api.fakes import ADA, BOB, HOST, NOW, ROOT, client, served, tokens

#: Endpoints that tell nothing about anybody's studies.
OPEN = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/login"),
    ("POST", "/login"),
    ("POST", "/logout"),
    ("GET", "/assets/{name}"),
    ("GET", "/openapi.json"),
}
#: Where a person without a token is sent.
TO_LOGIN = {("GET", "/")}
#: What any user may ask, and gets their own part of.
EVERYBODYS = {
    ("GET", "/studies"),
    ("POST", "/studies"),
    ("GET", "/devices"),
    ("GET", "/fits"),
    ("GET", "/me"),
    ("GET", "/page/board"),
    ("GET", "/page/new"),
}
#: A stream, which a test client would read to its end.
STREAMS = {("GET", "/events")}
BODIES: dict[str, Any] = {
    "priority": {"priority": -1},
    "move": {"place": 1},
    "clone": {},
    "trials": {"settings": {"learning_rate": 1e-4}},
    "studies": {},
    "login": {"token": "x"},
}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with served(tmp_path) as made:
        yield made


def endpoints(service: Service) -> set[tuple[str, str]]:
    """Return every route that the application has, with its method."""
    guard = client(service).app
    assert isinstance(guard, Guard)
    app = guard._app
    assert isinstance(app, FastAPI)
    found = set()
    for route in walked(app.router.routes):
        for method in getattr(route, "methods", None) or ():
            if method != "HEAD":
                found.add((method, route.path))
    return found


def walked(routes: Any) -> Iterator[Any]:
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from walked(included.routes)
        else:
            yield route


def ask(by: TestClient, method: str, path: str, item: int) -> Any:
    """Send a request that is well formed, about an item."""
    filled = {"item_id": item, "number": 0, "action": "stop", "path": "best.yaml", "name": "page.css"}
    place = re.sub(r"{(\w+)(:\w+)?}", lambda match: str(filled[match[1]]), path)
    query = {"model": "Llama-3.1-8B"} if path == "/fits" else {}
    body = BODIES.get(path.rpartition("/")[2]) if method == "POST" else None
    return by.request(method, place, params=query, json=body, follow_redirects=False)


def test_every_endpoint_is_closed_but_for_those_that_say_nothing(service: Service) -> None:
    made = tokens(service, ADA, BOB, ROOT)
    service.planner.answers = lambda question: {"demand": None, "refusal": "no", "lines": []}
    as_ada, as_bob = client(service, made["ada"]), client(service, made["bob"])
    service.planner.is_slow = True
    item = as_ada.post("/studies", json={}).json()["id"]
    service.planner.is_slow = False
    table = {}
    found = endpoints(service)
    assert len(found) > 30, found
    for method, path in sorted(found - OPEN - STREAMS):
        refused = 303 if (method, path) in TO_LOGIN else 401
        table[method, path] = [
            ask(client(service), method, path, item).status_code == refused,
            ask(client(service, "made-up"), method, path, item).status_code == refused,
        ]
        if (method, path) not in EVERYBODYS | TO_LOGIN:
            table[method, path].append(
                ask(as_bob, method, path, item).status_code == 404 or path.endswith("/move")
            )
    assert [key for key, passed in table.items() if not all(passed)] == []
    for method, path in STREAMS:
        assert ask(client(service), method, path, item).status_code == 401
    for method, path in OPEN - {("POST", "/login")}:
        assert ask(client(service), method, path, item).status_code in (200, 503), path


def test_another_users_item_is_neither_changed_nor_told_of(service: Service) -> None:
    made = tokens(service, ADA, BOB)
    item = client(service, made["ada"]).post("/studies", json={}).json()["id"]
    before = service.queue.get(item)
    as_bob = client(service, made["bob"])
    for method, path in sorted(endpoints(service)):
        if "{item_id}" in path:
            there, nowhere = (ask(as_bob, method, path, number) for number in (item, 999))
            assert there.status_code == nowhere.status_code, path
            assert there.text.replace(str(item), "N") == nowhere.text.replace("999", "N"), path
    assert service.queue.get(item) == before


def test_a_revoked_token_opens_nothing_once_it_is_forgotten(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(context.time, "monotonic", lambda: now[0])
    made = tokens(service, ADA)
    as_ada = client(service, made["ada"])
    item = as_ada.post("/studies", json={}).json()["id"]
    service.queue.users.revoke("ada", now=NOW)
    now[0] += context.TOKEN_KEPT_S
    for method, path in sorted(endpoints(service) - OPEN - STREAMS - TO_LOGIN):
        assert ask(as_ada, method, path, item).status_code == 401, path


def test_without_users_on_loopback_whoever_is_there_is_admin(tmp_path: Path) -> None:
    with served(tmp_path, local_user=ROOT) as service:
        assert client(service).get("/me").json() == {"name": "root", "role": "admin"}
        assert client(service, "made-up").get("/me").status_code == 401


HOSTS = {
    "ours": (HOST, 200),
    "another name that points here": ("evil.example:8090", 403),
    "another port": ("127.0.0.1:80", 403),
    "in capitals": (HOST.upper(), 200),
    "none": ("", 403),
}


@pytest.mark.parametrize("case", HOSTS)
def test_only_our_own_host_is_answered(tmp_path: Path, case: str) -> None:
    host, status = HOSTS[case]
    with served(tmp_path, local_user=ROOT) as service:
        assert client(service).get("/studies", headers={"Host": host}).status_code == status


ORIGINS = {
    "a program": ({}, 201),
    "our own page": ({"Origin": f"http://{HOST}"}, 201),
    "our own page behind TLS": ({"Origin": f"https://{HOST}"}, 201),
    "another page": ({"Origin": "http://evil.example"}, 403),
    "a page without an origin": ({"Origin": "null"}, 403),
    "another page of an old browser": ({"Sec-Fetch-Site": "cross-site"}, 403),
}


@pytest.mark.parametrize("case", ORIGINS)
def test_a_change_comes_from_our_own_page_or_from_none(tmp_path: Path, case: str) -> None:
    headers, status = ORIGINS[case]
    with served(tmp_path, local_user=ROOT) as service:
        assert client(service).post("/studies", json={}, headers=headers).status_code == status
        assert len(service.queue.items()) == (status == 201)


def test_signing_in_keeps_the_token_from_scripts_and_other_pages(service: Service) -> None:
    made = tokens(service, ADA)
    by = client(service)
    assert by.post("/login", json={"token": "made-up"}).status_code == 401
    answer = by.post("/login", json={"token": made["ada"]})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert by.get("/me").json()["name"] == "ada"
    by.post("/logout")
    assert by.get("/me").status_code == 401


def test_answers_are_shown_in_no_other_page_and_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    with served(tmp_path, local_user=ROOT) as service:
        headers = client(service).get("/").headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
