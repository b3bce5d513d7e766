"""Which requests are let through before anything reads them: by host, by origin.

Any page that a browser shows may send requests to a server on this machine, by its name or by one of its own
that it lets point there (DNS rebinding).  So the host has to be one of ours, and what changes something has
to come from our own page, or from no page at all.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

READING = ("GET", "HEAD", "OPTIONS")
#: What probes of a machine ask for without knowing its name.
PROBES = ("/healthz", "/readyz", "/metrics")
#: Nothing of ours is loaded from elsewhere, nor shown inside another page.
POLICY = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"


class Guard:
    """An ASGI application in front of another one."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str]) -> None:
        """Let requests to `hosts` ("127.0.0.1:8090", "gpus.example.org") through."""
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        if (why := self._refusal(scope)) is not None:
            await JSONResponse({"error": why, "remedy": None}, status_code=403)(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Referrer-Policy", "no-referrer")
                headers.setdefault("Content-Security-Policy", POLICY)
            await send(message)

        await self._app(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> str | None:
        """Return why a request is refused, None where it is not."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if host not in self._hosts and scope["path"] not in PROBES:
            return f"This server does not answer to {host[:200]!r}: start it with --host-name NAME."
        if scope["method"] in READING:
            return None
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in {f"{kind}://{host}" for kind in ("http", "https")}:
            return "Another page has asked for this change."
        if origin is None and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return "Another page has asked for this change."
        return None
