"""A client of the service: what the page and the command line do, as functions.

    with Client("http://127.0.0.1:8090") as client:
        item = client.submit("tune", {"model": "llama", "data": "chats.jsonl", "trials": 24})
        client.wait(item["id"])

Answers are the objects that OpenAPI describes (`GET /openapi.json`), as dictionaries.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from autosft.profiles.errors import UserError

#: How long an answer is waited for: longer than the server takes to plan.
TIMEOUT_S = 150.0
#: How often a submission is sent again whose answer was lost; its key keeps it from being queued twice.
NUM_TRIES = 3
RETRY_S = 1.0
POLL_S = 2.0
ENDED = ("done", "failed", "cancelled", "refused")


class Client:
    """Talks to one server, as one user.

    `token` is by default that of AUTOSFT_TOKEN.  Methods raise UserError for what the server refuses, and for
    a server that does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        transport: Any = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import httpx2

        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--server {url}: not a URL.", remedy="For example http://127.0.0.1:8090.")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.is_local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        token = token or os.environ.get("AUTOSFT_TOKEN")
        self._sleep = sleep
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=TIMEOUT_S,
            transport=transport,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # The queue

    def submit(
        self,
        command: str,
        arguments: Mapping[str, Any],
        *,
        configuration: str | None = None,
        key: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Queue a command once, whatever is lost on the way; `options` are those of `POST /studies`."""
        body = {"command": command, "arguments": dict(arguments), "configuration": configuration, **options}
        return self._post("/studies", body, key=key or uuid.uuid4().hex)

    def clone(self, item: int, arguments: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Queue what an item is, with fields changed; None removes one."""
        body = {"arguments": dict(arguments), **options}
        return self._post(f"/studies/{item}/clone", body, key=uuid.uuid4().hex)

    def items(self, **query: Any) -> list[dict[str, Any]]:
        """Return the items in the order of the queue; `query` is that of `GET /studies`."""
        found = self._get("/studies", query)
        return list(found["items"])

    def item(self, number: int) -> dict[str, Any]:
        return self._get(f"/studies/{number}")

    def find(self, named: str) -> dict[str, Any]:
        """Return an item by its number, or the newest of a name."""
        if named.isdigit():
            return self.item(int(named))
        found = self.items(name=named, limit=1)
        if not found:
            raise UserError(f"There is no {named!r} in the queue of {self.url}.", remedy="autosft queue")
        return found[0]

    def act(self, item: int, action: str, **body: Any) -> dict[str, Any]:
        """Hold, release, cancel, move (`place`), prioritize (`priority`), pause, resume or stop an item."""
        return self._post(f"/studies/{item}/{action}", body or None)

    # What it does

    def trials(self, item: int) -> dict[str, Any]:
        return self._get(f"/studies/{item}/trials")

    def enqueue(self, item: int, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Have a study try these settings next."""
        return self._post(f"/studies/{item}/trials", {"settings": dict(settings)})

    def log(self, item: int, *, offset: int = 0) -> dict[str, Any]:
        return self._get(f"/studies/{item}/log", {"offset": offset})

    def report(self, item: int) -> str:
        """Return the report's page."""
        return str(self._answer("GET", f"/studies/{item}/report").text)

    def export(self, item: int) -> str:
        """Return the best configuration, a best.yaml."""
        return str(self._answer("GET", f"/studies/{item}/export").text)

    def files(self, item: int) -> dict[str, Any]:
        """Return what an item has written."""
        return self._get(f"/studies/{item}/artifacts")

    def download(self, item: int, path: str, to: Path) -> None:
        """Write one of an item's files."""
        with self._http.stream("GET", f"/studies/{item}/artifacts/{path}") as answer, to.open("wb") as file:
            self._check(answer)
            for part in answer.iter_bytes():
                file.write(part)

    def follow(self, item: int) -> Iterator[str]:
        """Yield what an item prints until it has ended."""
        offset = 0
        while True:
            said = self.log(item, offset=offset)
            if said["text"]:
                yield said["text"]
            is_over = said["is_complete"] and said["offset"] == offset
            offset = said["offset"]
            if is_over and self.item(item)["state"] in ENDED:
                return
            if not said["text"]:
                self._sleep(POLL_S)

    def wait(self, item: int) -> dict[str, Any]:
        """Return an item once it has ended."""
        while (shown := self.item(item))["state"] not in ENDED:
            self._sleep(POLL_S)
        return shown

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield events as they happen: kind and values."""
        with self._http.stream("GET", "/events", timeout=None) as answer:
            self._check(answer)
            kind = "message"
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)

    # The server

    def fits(self, **question: Any) -> dict[str, Any]:
        """Return whether a model fits, as `GET /fits` describes it."""
        return self._get("/fits", {name: value for name, value in question.items() if value is not None})

    def devices(self) -> list[dict[str, Any]]:
        return list(self._get("/devices")["devices"])

    def me(self) -> dict[str, Any]:
        return self._get("/me")

    def _get(self, path: str, query: Mapping[str, Any] | None = None) -> dict[str, Any]:
        found = self._answer("GET", path, params=dict(query or {})).json()
        assert isinstance(found, dict)
        return found

    def _post(self, path: str, body: object, *, key: str | None = None) -> dict[str, Any]:
        headers = {} if key is None else {"Idempotency-Key": key}
        found = self._answer("POST", path, json=body, headers=headers, is_safe=key is not None).json()
        assert isinstance(found, dict)
        return found

    def _answer(self, method: str, path: str, *, is_safe: bool = True, **request: Any) -> Any:
        """Return the server's answer; what may be sent again is, where the connection fails."""
        import httpx2

        for left in reversed(range(NUM_TRIES if is_safe else 1)):
            try:
                answer = self._http.request(method, path, **request)
            except httpx2.ConnectError as error:
                raise UserError(
                    f"No server answers at {self.url}: {error}.",
                    remedy="Start one with autosft serve, or give its address with --server.",
                ) from error
            except httpx2.HTTPError as error:
                if left == 0:
                    raise UserError(f"{self.url} did not answer: {type(error).__name__}.") from error
                self._sleep(RETRY_S)
            else:
                self._check(answer)
                return answer
        raise AssertionError("unreachable")

    def _check(self, answer: Any) -> None:
        if answer.is_success:
            return
        answer.read()
        try:
            said = answer.json()
            message, remedy = str(said["error"]), said.get("remedy")
        except (ValueError, KeyError, TypeError):
            message, remedy = f"{self.url} answered {answer.status_code}.", None
        if answer.status_code == 401:
            remedy = remedy or "Set AUTOSFT_TOKEN to the token that its admin has given you."
        raise UserError(message, remedy=remedy)
