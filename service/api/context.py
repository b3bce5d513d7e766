"""What the handlers of requests need, and who asks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import Depends, HTTPException, Request
from starlette.concurrency import run_in_threadpool

from autosft.profiles.errors import UserError
from autosft.service.api.events import Hub
from autosft.service.api.shown import ItemTexts
from autosft.service.api.written import Answers, Written
from autosft.service.board import Board
from autosft.service.requests.flags import CommandLine
from autosft.service.requests.limits import Limits
from autosft.service.requests.planner import Planner
from autosft.service.requests.read import Reader
from autosft.service.store.queue_store import QueueStore
from autosft.service.values import Item, Role, User
from autosft.studies.store.database import DatabaseError
from autosft.studies.store.records import Records

#: How long it may take until a token that another process has revoked is refused.
TOKEN_KEPT_S = 2.0
COOKIE = "autosft-token"
MAX_TOKENS = 10_000


class Scheduler(Protocol):
    """The loop, as far as requests have to do with it."""

    def board(self) -> Board:
        """Return the picture after its last decision."""
        ...

    def wake(self) -> None:
        """Have it look at the queue now."""
        ...

    def is_alive(self) -> bool:
        """Whether it has looked at the queue lately."""
        ...


@dataclass(slots=True, kw_only=True)
class Service:
    """Everything that requests are answered from."""

    queue: QueueStore
    records: Records  # studies, in the same database
    scheduler: Scheduler
    planner: Planner
    limits: Limits
    command_line: CommandLine
    spool: Path  # configurations that requests bring
    log_of: Callable[[Item], Path | None]  # the log of an item's driver, None before its first start
    local_user: User | None  # who asks without a token; None: nobody may
    hosts: frozenset[str]  # names and ports that this server answers to
    is_public: bool = False  # behind TLS: cookies are sent over it alone
    clock: Callable[[], float] = time.time
    hub: Hub = field(default_factory=Hub)
    answers: Answers = field(default_factory=Answers)
    written: Written = field(default_factory=Written)
    texts: ItemTexts = field(default_factory=ItemTexts)
    defaults: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    dashboard: Callable[[], Any] | None = None  # makes Optuna's, a WSGI application
    _tokens: dict[str, tuple[float, User | None]] = field(default_factory=dict)

    def note(self, user: User, item: Item) -> None:
        """Have a user see at once what they have written, and the loop look at it."""
        self.written.note(user.name, item, at=self.clock())
        self.scheduler.wake()

    async def user_of(self, token: str) -> User | None:
        """Return whose token this is; remembers the answer for TOKEN_KEPT_S."""
        key, now = hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest(), time.monotonic()
        at, user = self._tokens.get(key, (float("-inf"), None))
        if now - at < TOKEN_KEPT_S:
            return user
        user = await run_in_threadpool(self.queue.users.verify, token)
        if len(self._tokens) > MAX_TOKENS:  # made-up ones
            self._tokens.clear()
        self._tokens[key] = now, user
        return user

    def reader(self, user: User) -> Reader:
        """Return what reads a user's requests."""

        def may_use(name: str) -> bool:
            owners = self.queue.owners(name)
            if user.role is Role.ADMIN:
                return bool(owners) or self.records.find_study(name) is not None
            return owners == {user.name}

        def is_taken(name: str) -> bool:
            if user.role is Role.ADMIN:
                return False
            owners = self.queue.owners(name)
            return owners != {user.name} and (bool(owners) or self.records.find_study(name) is not None)

        return Reader(
            owner=user.name,
            limits=self.limits,
            command_line=self.command_line,
            spool=self.spool,
            is_taken=is_taken,
            may_use=may_use,
            defaults=self.defaults,
        )


async def service_of(request: Request) -> Service:  # a plain function would be sent to a thread
    """Return the service that an application serves."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


The = Annotated[Service, Depends(service_of)]


def token_in(request: Request) -> str | None:
    """Return the token that a request brings: as a header, or as the cookie of the page."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    return request.cookies.get(COOKIE)


async def asking(request: Request, service: The) -> User:
    """Return who asks.  Answers 401 for a token that is nobody's, and without one where one is needed."""
    token = token_in(request)
    user = service.local_user if token is None else await service.user_of(token)
    if user is None:
        raise HTTPException(
            401,
            "This server asks for a token: Authorization: Bearer TOKEN."
            if token is None
            else "This token is nobody's, or was revoked.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return user


Asking = Annotated[User, Depends(asking)]


def item_of(service: Service, user: User, item_id: int) -> Item:
    """Return an item that a user may see.  Answers 404 for others': whether there is one is not told."""
    try:
        item = service.queue.get(item_id)
    except DatabaseError:
        raise
    except UserError:
        item = None
    if item is None or not may_see(user, item):
        raise HTTPException(404, f"There is no item {item_id} that you may see.")
    return item


def may_see(user: User, item: Item) -> bool:
    """Whether a user may see and stop an item."""
    return user.role is Role.ADMIN or item.owner == user.name


def whose(user: User) -> str | None:
    """Return whose items a user sees, None for all: those with the same answer get the same texts."""
    return None if user.role is Role.ADMIN else user.name


def require_admin(user: User) -> None:
    """Answer 403 where only an admin may."""
    if user.role is not Role.ADMIN:
        raise HTTPException(403, "Only an admin may do this.")
