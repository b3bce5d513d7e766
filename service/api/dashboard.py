"""Optuna's dashboard in the same server, for admins: it shows, changes and deletes all studies."""

from __future__ import annotations

import threading
from typing import Any

from a2wsgi import WSGIMiddleware
from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from autosft.service.api.context import Service, asking, require_admin

#: The paths that its page asks for, which has no place of its own below ours.
PATHS = ("/dashboard", "/api", "/static", "/csv", "/artifacts")
#: Its page computes in WebAssembly, and draws with styles and images that it makes.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'none'"
)


def mount_dashboard(app: FastAPI) -> None:
    """Add its paths to the application; it is imported at the first request."""
    service: Service = app.state.service
    if service.dashboard is None:
        return
    guarded = _ForAdmins(app)
    for path in PATHS:
        app.router.routes.append(Mount(path, app=_WithPrefix(guarded, path)))


class _WithPrefix:
    """Hands on the whole path: the dashboard's routes begin at the root."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "root_path": ""}, receive, send)


class _ForAdmins:
    """Asks who it is, then hands on to the dashboard."""

    def __init__(self, app: FastAPI) -> None:
        self._service: Service = app.state.service
        self._lock = threading.Lock()
        self._dashboard: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        user = await asking(request, self._service)
        require_admin(user)
        dashboard = await run_in_threadpool(self._opened)

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"]]
                message = {**message, "headers": [*headers, (b"content-security-policy", POLICY.encode())]}
            await send(message)

        headers = list(scope["headers"])
        if not any(name == b"accept-encoding" for name, _ in headers):  # it fails without
            headers.append((b"accept-encoding", b"identity"))
        await dashboard({**scope, "headers": headers}, receive, with_policy)

    def _opened(self) -> Any:
        with self._lock:
            if self._dashboard is None:
                assert self._service.dashboard is not None
                self._dashboard = WSGIMiddleware(self._service.dashboard())
            return self._dashboard
