"""Who may write to a study: one driver at a time, replaced only when it is dead."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autosft.studies import tables
from autosft.studies.values import Driver, StudyInUseError

#: A driver that has not been heard of for so long is taken for dead, wherever it runs.
HEARTBEAT_TIMEOUT_S = 60.0


def acquire(
    connection: Connection, study_id: int, driver: Driver, *, study: str, environment: str, now: float
) -> int:
    """Make `driver` the study's driver within the caller's transaction; return the id of its row.

    Raises StudyInUseError where another one lives.
    """
    this = tables.studies.c.id == study_id
    holder_id = connection.scalar(sa.select(tables.studies.c.driver_id).where(this).with_for_update())
    if holder_id is not None:
        query = sa.select(tables.drivers).where(tables.drivers.c.id == holder_id)
        holder = connection.execute(query).mappings().one()
        _refuse_if_alive(holder, driver, study=study, now=now)
        dead = sa.update(tables.drivers).where(tables.drivers.c.id == holder_id)
        connection.execute(dead.values(ended_at=holder["heartbeat_at"]))
    columns = {
        "study_id": study_id,
        "host": driver.host,
        "pid": driver.pid,
        "pid_started_at": driver.pid_started_at,
        "started_at": now,
        "heartbeat_at": now,
        "environment": environment,
    }
    inserted = connection.execute(sa.insert(tables.drivers).values(columns)).inserted_primary_key
    assert inserted is not None
    connection.execute(sa.update(tables.studies).where(this).values(driver_id=inserted[0]))
    return int(inserted[0])


def _refuse_if_alive(holder: sa.RowMapping, driver: Driver, *, study: str, now: float) -> None:
    previous = Driver(host=holder["host"], pid=holder["pid"], pid_started_at=holder["pid_started_at"])
    if previous == driver or now - holder["heartbeat_at"] > HEARTBEAT_TIMEOUT_S:
        return
    if previous.host == driver.host and not _is_running(previous):
        return
    since = datetime.fromtimestamp(holder["started_at"]).astimezone().strftime("%Y-%m-%d %H:%M")
    raise StudyInUseError(
        f"Study {study!r} is being run by process {previous.pid} on {previous.host} since {since}.",
        remedy="Follow it there, stop it with Ctrl+C, or start another study with --study NAME.",
    )


def _is_running(driver: Driver) -> bool:
    """Whether the very process lives, not another one that was given its number."""
    import psutil

    try:
        process = psutil.Process(driver.pid)
        started_at: float = process.create_time()
        return abs(started_at - driver.pid_started_at) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
