"""From a submission to an item: read, checked, predicted if that is known already, and recorded once."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from fastapi import HTTPException

from autosft.profiles.errors import UserError
from autosft.service.api.context import Service, item_of
from autosft.service.api.models import Changed, Submitted
from autosft.service.requests.flags import CommandLine
from autosft.service.requests.planner import PlannerFailedError
from autosft.service.store.queue_store import ItemMovedError
from autosft.service.values import (
    OPEN_STATES,
    PLACED_STATES,
    Arguments,
    Demand,
    Item,
    ItemState,
    Role,
    Submission,
    User,
)
from autosft.studies.wire import from_plain, to_plain

logger = logging.getLogger(__name__)

#: Where an item may be when what it needs becomes known.
_UNPLACED = OPEN_STATES - PLACED_STATES


def submit(
    service: Service, user: User, body: Submitted, *, key: str | None = None, cloned_from: int | None = None
) -> tuple[Item, bool]:
    """Put a request into the queue; return its item, and whether it is new.

    Raises UserError for a request that is wrong, and for one that is known to fit nowhere.
    """
    require_priority(user, body.priority)
    for other in body.after:
        item_of(service, user, other)
    name, arguments = service.reader(user).read(
        body.command,
        body.arguments,
        name=body.name,
        configuration=body.configuration,
        key=key or uuid.uuid4().hex,
    )
    asked = service.planner.ask(question_of(arguments))
    demand = None
    if asked.done():
        demand, refusal = prediction_in(asked)
        if refusal:
            raise UserError(refusal)
    submission = Submission(
        name=name,
        owner=user.name,
        arguments=arguments,
        demand=demand,
        priority=body.priority,
        not_before=body.not_before,
        after=tuple(dict.fromkeys(body.after)),
        may_share=body.may_share,
        is_held=body.hold,
        cloned_from=cloned_from,
    )
    item, is_new = service.queue.submit(submission, key=key, now=service.clock())
    if is_new and demand is None:
        asked.add_done_callback(lambda done: record_prediction(service, item.id, done))
    service.note(user, item)
    return item, is_new


def clone(service: Service, user: User, item: Item, body: Changed, *, key: str | None) -> tuple[Item, bool]:
    """Queue what an item is, with fields changed."""
    given, configuration = given_in(item.arguments, service.command_line)
    changed = {name.removeprefix("--").replace("-", "_"): value for name, value in body.arguments.items()}
    given = {name: value for name, value in (given | changed).items() if value is not None}
    if body.warm_start:
        if item.arguments.command != "tune":
            raise UserError("Only a study can start from another's best settings.")
        given["warm_start"] = item.name
    asked = Submitted(
        command=item.arguments.command,  # type: ignore[arg-type]
        arguments=given,
        configuration=configuration,
        name=body.name,
        priority=body.priority,
        not_before=None,
        may_share=item.may_share,
        hold=body.hold,
    )
    return submit(service, user, asked, key=key, cloned_from=item.id)


def given_in(arguments: Arguments, command_line: CommandLine) -> tuple[dict[str, Any], str | None]:
    """Return a command line as a request that gives it, without its name and place, and its configuration."""
    flags = command_line.flags(arguments.command)
    by_spelling = {flag.spelled: flag for flag in flags.values() if flag.spelled}
    by_spelling |= {flag.off: flag for flag in flags.values() if flag.off}
    given: dict[str, Any] = {}
    for spelled, value in arguments.flags:
        flag = by_spelling[spelled]
        if flag.is_switch:
            given[flag.name] = spelled == flag.spelled
        elif flag.is_repeated:
            given.setdefault(flag.name, []).append(value)
        else:
            given[flag.name] = value
    given.pop("study", None)
    given.pop("output", None)
    if arguments.command == "evaluate":
        given["given_models"] = list(arguments.positional)
    if arguments.command != "train":
        return given, None
    try:
        return given, Path(arguments.positional[0]).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError("The configuration of the original is gone.", remedy="Submit it anew.") from error


def require_priority(user: User, priority: int) -> None:
    """Answer 403 for a priority that only an admin gives."""
    if priority > 0 and user.role is not Role.ADMIN:
        raise HTTPException(403, f"Priority {priority}: only an admin gives one above 0.")


# Predictions


def question_of(arguments: Arguments) -> Mapping[str, Any]:
    """Return what the planner is asked about an item."""
    return {"kind": "item", "arguments": to_plain(arguments)}


def prediction_in(done: Future[Any]) -> tuple[Demand | None, str]:
    """Return what an item needs, or why it cannot run here.  Raises PlannerFailedError."""
    try:
        said = done.result()
    except UserError as error:
        return None, str(error)
    demand = said["demand"]
    return (None, said["refusal"]) if demand is None else (from_plain(Demand, demand), "")


def record_prediction(service: Service, item_id: int, done: Future[Any]) -> None:
    """Record what was predicted of an item, and refuse it if it fits nowhere."""
    now = service.clock()
    try:
        try:
            demand, refusal = prediction_in(done)
        except PlannerFailedError as error:
            service.queue.hold(item_id, note=f"What it needs could not be predicted: {error}", now=now)
            return
        if demand is not None:
            service.queue.plan(item_id, demand, now=now)
        else:
            refused = ItemState.REFUSED
            service.queue.transition(item_id, _UNPLACED, refused, now=now, note=refusal, ended_at=now)
    except (ItemMovedError, UserError) as error:  # cancelled meanwhile
        logger.info("item %d: its prediction is not needed any more: %s", item_id, error)
    except Exception:
        logger.exception("item %d: its prediction could not be recorded", item_id)
    finally:
        service.scheduler.wake()


def plan_the_unplanned(service: Service) -> None:
    """Ask for what is not known of items that an earlier server has left."""
    for item in service.queue.items(_UNPLACED):
        if item.demand is None:
            asked = service.planner.ask(question_of(item.arguments))
            asked.add_done_callback(lambda done, item_id=item.id: record_prediction(service, item_id, done))  # type: ignore[misc]
