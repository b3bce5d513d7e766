"""Who may use the dashboard: the browser that was given this start's address, and no other page in it.

Any page that a browser shows may send requests to 127.0.0.1, by that name or by one of its own that it lets
point there (DNS rebinding); any other user of the machine may connect.  So the host has to be ours, a token
of this start has to come along, first in the address and then in a cookie, and what changes something has to
come from our own page.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode

Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]

COOKIE = "autosft-dashboard"
PARAMETER = "token"
READING = ("GET", "HEAD", "OPTIONS")


class Guard:
    """A WSGI application in front of another one."""

    def __init__(self, application: Application, *, hosts: Iterable[str], token: str | None = None) -> None:
        """Let requests to `hosts` ("127.0.0.1:8080") through that bring `token`, by default a new one."""
        self.token = token or secrets.token_urlsafe(24)
        self._application = application
        self._hosts = frozenset(hosts)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("HTTP_HOST", "").lower() not in self._hosts:
            return refuse(
                start_response, "This dashboard is reached by the address that autosft has printed."
            )
        query = parse_qs(environ.get("QUERY_STRING", ""))
        if self._is_token(query.pop(PARAMETER, [""])[0]):
            return self._remember(environ, start_response, urlencode(query, doseq=True))
        if not self._is_token(token_in_cookie(environ)):
            return refuse(start_response, "Open the address that autosft has printed, with its token.")
        if environ.get("REQUEST_METHOD") not in READING and not self._is_own_page(environ):
            return refuse(start_response, "Another page has asked for this change.")
        return self._application(environ, start_response)

    def _remember(self, environ: Environ, start_response: StartResponse, query: str) -> Iterable[bytes]:
        """Answer with the address without the token, which should not stay in the browser's history."""
        place = environ.get("PATH_INFO") or "/"
        location = f"/{place.lstrip('/')}" + (f"?{query}" if query else "")
        cookie = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict"
        start_response("303 See Other", [("Location", location), ("Set-Cookie", cookie)])
        return [b""]

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(errors="replace"), self.token.encode())

    def _is_own_page(self, environ: Environ) -> bool:
        origin = environ.get("HTTP_ORIGIN")
        return origin is None or origin.lower() in {f"http://{host}" for host in self._hosts}


def token_in_cookie(environ: Environ) -> str:
    """Return the token that a request brings, "" without one."""
    try:
        found = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def refuse(start_response: StartResponse, why: str) -> Iterable[bytes]:
    start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
    return [why.encode()]
