"""Who runs a queue: one server at a time, replaced only when it is dead."""

from __future__ import annotations

import dataclasses
import json

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autosft.profiles.errors import UserError
from autosft.service.store.item_rows import dump
from autosft.studies.store import tables
from autosft.studies.store.driver_lease import lives
from autosft.studies.values import Driver
from autosft.studies.wire import from_plain

_ROW = sa.select(tables.service_servers).where(tables.service_servers.c.id == 1)


class ServedElsewhereError(UserError):
    """Another live process serves this queue."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The process that runs a queue, or ran it last."""

    process: Driver
    url: str  # where it answers, "" while it does not
    started_at: float
    heartbeat_at: float
    ended_at: float | None  # None: it runs, or it died


def read_server(connection: Connection) -> Server | None:
    row = connection.execute(_ROW).mappings().one_or_none()
    if row is None:
        return None
    return Server(
        process=from_plain(Driver, json.loads(row["process"])),
        url=row["url"],
        started_at=row["started_at"],
        heartbeat_at=row["heartbeat_at"],
        ended_at=row["ended_at"],
    )


def take_over(connection: Connection, process: Driver, *, now: float) -> int:
    """Make `process` the queue's server; return its generation, which its starts are checked against.

    Raises ServedElsewhereError if another live process is.
    """
    row = connection.execute(_ROW.with_for_update()).mappings().one_or_none()
    generation = 1 if row is None else row["generation"] + 1
    columns = {
        "generation": generation,
        "process": dump(process),
        "url": "",
        "started_at": now,
        "heartbeat_at": now,
        "ended_at": None,
    }
    if row is None:
        connection.execute(sa.insert(tables.service_servers), {"id": 1, **columns})
        return generation
    before = from_plain(Driver, json.loads(row["process"]))
    silent_s = now - row["heartbeat_at"]
    if row["ended_at"] is None and before != process and lives(before, silent_s=silent_s, driver=process):
        raise ServedElsewhereError(
            f"This queue is served already: process {before.pid} on {before.host}"
            f"{', ' + row['url'] if row['url'] else ''}.",
            remedy="Use that server, end it, or serve another database with --storage.",
        )
    connection.execute(sa.update(tables.service_servers).where(tables.service_servers.c.id == 1), columns)
    return generation


def check(connection: Connection, generation: int) -> None:
    """Raise ServedElsewhereError if another server has taken over since; the row stays locked."""
    row = connection.execute(_ROW.with_for_update()).mappings().one_or_none()
    if row is None or row["generation"] != generation:
        raise ServedElsewhereError("Another server has taken over this queue; this one starts nothing more.")


def update(connection: Connection, generation: int, **columns: object) -> None:
    """Record a heartbeat, a URL or the end, if this server is still the one."""
    check(connection, generation)
    connection.execute(sa.update(tables.service_servers).where(tables.service_servers.c.id == 1), columns)
