"""`/studies`: what is queued, runs and has ended, and what may be done with it in the queue.

An item is any command that was queued; most are studies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Query, Response
from starlette.concurrency import run_in_threadpool

from autosft.service.api import models
from autosft.service.api.context import Asking, Service, The, item_of, may_see, require_admin, whose
from autosft.service.api.shown import shown_item
from autosft.service.api.submissions import clone, require_priority, submit
from autosft.service.values import ENDED_STATES, QUEUED_STATES, Item, ItemState, User

router = APIRouter(tags=["queue"])

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="The same key gives the same item, so that a request may be sent again.",
    ),
]


@router.post("/studies", status_code=201)
def submit_study(
    body: models.Submitted, service: The, user: Asking, response: Response, key: Key = None
) -> models.Shown:
    """Queue a command; answers at once, before what it needs is predicted."""
    item, is_new = submit(service, user, body, key=key)
    response.status_code = 201 if is_new else 200
    return _shown(service, item)


@router.get("/studies", response_model=models.Listed)
async def list_studies(
    *,
    service: The,
    user: Asking,
    state: Annotated[list[ItemState] | None, Query()] = None,
    name: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=2000)] = 100,
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
) -> Response:
    """List what runs, then what waits in its order, then what is held, then what has ended, newest first."""
    board, answers, states = service.scheduler.board(), service.answers, frozenset(state or ItemState)
    shows = board
    if (own := service.written.own(user.name, board)) is not None:
        shows, answers = own
    if name is not None:  # of all times
        named = await run_in_threadpool(service.queue.named, name)
        found = [each for each in named if each.state in states and may_see(user, each)]
        shown = [shown_item(item, board) for item in found[offset : offset + limit]]
        listed = models.Listed(items=shown, total=len(found), at=board.at)
        return Response(listed.model_dump_json(), media_type="application/json")

    def answer() -> str:
        found = shows.seen_by(user)
        if state:
            found = tuple(item for item in found if item.state in states)
        texts = service.texts.of(board, found[offset : offset + limit])
        return listed_text(texts, total=len(found), at=board.at)

    text = await answers.get(shows, ("studies", whose(user), states, limit, offset), answer)
    return Response(text, media_type="application/json")


@router.get("/studies/{item_id}")
def show_study(item_id: models.Id, service: The, user: Asking) -> models.Shown:
    """Show one item as the database has it now."""
    return _shown(service, item_of(service, user, item_id))


@router.post("/studies/{item_id}/cancel")
def cancel_study(
    item_id: models.Id, service: The, user: Asking, body: models.Noted | None = None
) -> models.Shown:
    """End an item; one that runs stops first, and keeps what it has done."""
    note = body.note if body else ""
    return _done(service, user, item_id, lambda queue, now: queue.cancel(item_id, note=note, now=now))


@router.post("/studies/{item_id}/hold")
def hold_study(
    item_id: models.Id, service: The, user: Asking, body: models.Noted | None = None
) -> models.Shown:
    """Take an item out of the queue; one that runs stops first, with its checkpoints."""
    note = body.note if body else ""
    return _done(service, user, item_id, lambda queue, now: queue.hold(item_id, note=note, now=now))


@router.post("/studies/{item_id}/release")
def release_study(item_id: models.Id, service: The, user: Asking) -> models.Shown:
    """Put a held item back into the queue."""
    return _done(service, user, item_id, lambda queue, now: queue.release(item_id, now=now))


@router.post("/studies/{item_id}/priority")
def prioritize_study(
    item_id: models.Id, body: models.Prioritized, service: The, user: Asking
) -> models.Shown:
    """Give an item another priority; above 0 only as admin."""
    require_priority(user, body.priority)
    return _done(
        service, user, item_id, lambda queue, now: queue.set_priority(item_id, body.priority, now=now)
    )


@router.post("/studies/{item_id}/move")
def move_study(item_id: models.Id, body: models.Moved, service: The, user: Asking) -> models.Shown:
    """Give an item a place in the queue, before fair share and priorities; only as admin."""
    require_admin(user)
    item_of(service, user, item_id)
    board = service.scheduler.board()
    queued = [item.id for item in board.items if item.state in QUEUED_STATES and item.id != item_id]
    ahead = queued[: body.place - 1]
    return _done(service, user, item_id, lambda queue, now: queue.move(item_id, ahead=ahead, now=now))


@router.post("/studies/{item_id}/clone", status_code=201)
def clone_study(
    *,
    item_id: models.Id,
    body: models.Changed,
    service: The,
    user: Asking,
    response: Response,
    key: Key = None,
) -> models.Shown:
    """Queue the same with fields changed."""
    item, is_new = clone(service, user, item_of(service, user, item_id), body, key=key)
    response.status_code = 201 if is_new else 200
    return _shown(service, item)


@router.get("/me")
async def who_asks(user: Asking) -> models.Me:
    """Return whose token this is."""
    return models.Me(name=user.name, role=user.role.value)


def listed_text(texts: Sequence[str], *, total: int, at: float) -> str:
    """Return `models.Listed` of items as JSON that are JSON already."""
    return f'{{"items":[{",".join(texts)}],"total":{total},"at":{json.dumps(at)}}}'


def _done(service: Service, user: User, item_id: int, act: Callable[[Any, float], Item]) -> models.Shown:
    """Do something with an item of the user's and show it."""
    item = item_of(service, user, item_id)
    if item.state in ENDED_STATES:
        raise HTTPException(409, f"{item.name} has ended: it is {item.state.value}.")
    after = act(service.queue, service.clock())
    service.note(user, after)
    return _shown(service, after)


def _shown(service: Service, item: Item) -> models.Shown:
    return shown_item(item, service.scheduler.board())
