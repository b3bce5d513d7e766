"""Who may use the dashboard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

from autosft.studies.dashboard.guard import COOKIE, Guard

HOST = "127.0.0.1:8080"
GOOD = f"{COOKIE}=secret"


@dataclass(frozen=True)
class Case:
    name: str
    allowed: bool
    environ: dict[str, str] = field(default_factory=dict)


CASES = [
    Case("the browser that has the token", True, {"HTTP_COOKIE": GOOD}),
    Case("by its other name", True, {"HTTP_COOKIE": GOOD, "HTTP_HOST": "localhost:8080"}),
    Case("without a token", False),
    Case("with another one", False, {"HTTP_COOKIE": f"{COOKIE}=other"}),
    Case("with a broken cookie", False, {"HTTP_COOKIE": "=;;{"}),
    Case("a name that points here", False, {"HTTP_COOKIE": GOOD, "HTTP_HOST": "example.org:8080"}),
    Case("no host", False, {"HTTP_COOKIE": GOOD, "HTTP_HOST": ""}),
    Case(
        "a change from our page",
        True,
        {"HTTP_COOKIE": GOOD, "REQUEST_METHOD": "DELETE", "HTTP_ORIGIN": f"http://{HOST}"},
    ),
    Case("a change by a program", True, {"HTTP_COOKIE": GOOD, "REQUEST_METHOD": "POST"}),
    Case(
        "a change from another page",
        False,
        {"HTTP_COOKIE": GOOD, "REQUEST_METHOD": "DELETE", "HTTP_ORIGIN": "http://example.org"},
    ),
    Case(
        "a change from a file",
        False,
        {"HTTP_COOKIE": GOOD, "REQUEST_METHOD": "PUT", "HTTP_ORIGIN": "null"},
    ),
]


def ask(**environ: str) -> tuple[str, dict[str, str]]:
    """Return status and headers of the answer to a request."""
    told: list[Any] = []

    def dashboard(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return [b"the dashboard"]

    guard = Guard(dashboard, hosts=(HOST, "localhost:8080"), token="secret")
    defaults = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "HTTP_HOST": HOST}
    list(guard({**defaults, **environ}, lambda status, headers: told.extend((status, dict(headers)))))
    return told[0], told[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_the_browser_that_was_given_the_address_gets_in(case: Case) -> None:
    status, _ = ask(**case.environ)
    assert status == ("200 OK" if case.allowed else "403 Forbidden")


def test_the_token_leaves_the_address_for_a_cookie_that_scripts_and_other_pages_cannot_use() -> None:
    status, headers = ask(QUERY_STRING="token=secret&study=3", PATH_INFO="//example.org/x")
    assert status == "303 See Other"
    assert headers["Location"] == "/example.org/x?study=3", "never to another host"
    assert headers["Set-Cookie"] == f"{GOOD}; Path=/; HttpOnly; SameSite=Strict"


def test_every_start_has_a_token_of_its_own() -> None:
    first, second = (Guard(lambda environ, start: [], hosts=()) for _ in range(2))
    assert first.token != second.token
    assert len(first.token) >= 32
