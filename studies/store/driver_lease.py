"""Who may write to a study: one driver at a time, replaced only when it is dead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from autosft.studies.store import tables
from autosft.studies.store.database import (
    begin,
    file_identity,
    readable_errors,
    require_same_file,
)
from autosft.studies.values import (
    Driver,
    LeaseLostError,
    StudyInUseError,
    current_boot_id,
    state_if_running,
)

#: A driver that sent no heartbeat for this long counts as dead, wherever it runs.
HEARTBEAT_TIMEOUT_S = 60.0
MIN_HEARTBEAT_INTERVAL_S = 5.0

#: Query for a study's driver; built once, as every write runs it.
_HOLDER = (
    sa.select(tables.studies.c.driver_id)
    .where(tables.studies.c.id == sa.bindparam("study_id"))
    .with_for_update()
)


class Lease:
    """The right to write to one study, once taken over; every write goes through `transaction`."""

    def __init__(self, engine: Engine, *, study_id: int, study: str) -> None:
        self._engine = engine
        self._study_id = study_id
        self._study = study
        self._driver_id: int | None = None
        self._heartbeat_at = 0.0
        self._file = file_identity(engine)

    def take_over(self, driver: Driver, *, environment: str, now: float) -> None:
        """Become the only writer.  Raises StudyInUseError if another live process is."""
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            self._driver_id = acquire(
                connection, self._study_id, driver, study=self._study, environment=environment, now=now
            )
        self._heartbeat_at = now

    def heartbeat(self, *, now: float) -> None:
        """Send a heartbeat; cheap however often it is called.  Raises LeaseLostError."""
        if 0 <= now - self._heartbeat_at < MIN_HEARTBEAT_INTERVAL_S:
            return
        with self.transaction() as connection:
            mine = tables.drivers.c.id == self._driver_id
            connection.execute(sa.update(tables.drivers).where(mine).values(heartbeat_at=now))
        self._heartbeat_at = now

    def is_held(self) -> bool:
        """Whether this process may still write."""
        if self._driver_id is None:
            return False
        with contextlib.suppress(LeaseLostError), self.transaction():
            return True
        return False

    def release(self, *, now: float) -> None:
        """Release the lease; does nothing without one."""
        if self._driver_id is None:
            return
        with contextlib.suppress(LeaseLostError), self.transaction() as connection:
            this = tables.studies.c.id == self._study_id
            mine = tables.drivers.c.id == self._driver_id
            connection.execute(sa.update(tables.studies).where(this).values(driver_id=None))
            connection.execute(sa.update(tables.drivers).where(mine).values(ended_at=now))
        self._driver_id = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Begin a transaction that only the lease's holder can commit.

        The study's row is read under the transaction's lock (SQLite: BEGIN IMMEDIATE), so that a driver that
        was suspended and replaced cannot write when it wakes up.
        """
        assert self._driver_id is not None, "take_over() comes before writing"
        require_same_file(self._engine, self._file)
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            holder = connection.scalar(_HOLDER, {"study_id": self._study_id})
            if holder != self._driver_id:
                raise LeaseLostError(
                    f"Study {self._study!r} was taken over by another process; this one stops writing.",
                    remedy="Watch it there, or stop it there and run the command again here.",
                )
            yield connection


def acquire(
    connection: Connection, study_id: int, driver: Driver, *, study: str, environment: str, now: float
) -> int:
    """Make `driver` the study's driver within the caller's transaction; return the id of its row.

    Raises StudyInUseError if another live process is.
    """
    this = tables.studies.c.id == study_id
    holder = refuse_if_alive(connection, study_id, driver, study=study, now=now)
    if holder is not None:
        dead = sa.update(tables.drivers).where(tables.drivers.c.id == holder["id"])
        connection.execute(dead.values(ended_at=holder["heartbeat_at"]))
    columns = {
        "study_id": study_id,
        "host": driver.host,
        "pid": driver.pid,
        "pid_started_at": driver.pid_started_at,
        "boot_id": driver.boot_id,
        "start_ticks": driver.start_ticks,
        "started_at": now,
        "heartbeat_at": now,
        "environment": environment,
    }
    inserted = connection.execute(sa.insert(tables.drivers).values(columns)).inserted_primary_key
    assert inserted is not None
    connection.execute(sa.update(tables.studies).where(this).values(driver_id=inserted[0]))
    return int(inserted[0])


def refuse_if_alive(
    connection: Connection, study_id: int, driver: Driver | None, *, study: str, now: float
) -> sa.RowMapping | None:
    """Raise StudyInUseError if another process than `driver` runs the study; return the last holder.

    The study's row stays locked until the caller's transaction ends.
    """
    holder_id = connection.scalar(_HOLDER, {"study_id": study_id})
    if holder_id is None:
        return None
    query = sa.select(tables.drivers).where(tables.drivers.c.id == holder_id)
    holder = connection.execute(query).mappings().one()
    previous = Driver(
        host=holder["host"],
        pid=holder["pid"],
        pid_started_at=holder["pid_started_at"],
        boot_id=holder["boot_id"] or "",
        start_ticks=holder["start_ticks"],
    )
    if previous == driver or not lives(previous, silent_s=now - holder["heartbeat_at"], driver=driver):
        return holder
    since = datetime.fromtimestamp(holder["started_at"]).astimezone().strftime("%Y-%m-%d %H:%M")
    raise StudyInUseError(
        f"Study {study!r} is already running: process {previous.pid} on {previous.host}, since {since}.",
        remedy="Watch it there, stop it with Ctrl+C, or start another study with --study NAME.",
    )


def lives(previous: Driver, *, silent_s: float, driver: Driver | None) -> bool:
    """Whether a driver is still at work.

    One of this machine whose process is known for certain lives as long as that does, whatever clocks say:
    they step, and a machine that sleeps sends no heartbeat.  One that is suspended may be replaced once it
    has been silent.  Of other machines, and of earlier versions' drivers, the heartbeat says it.
    """
    is_silent = silent_s > HEARTBEAT_TIMEOUT_S
    if previous.host != (driver.host if driver else Driver.current().host):
        return not is_silent
    if previous.start_ticks is not None and (boot_id := current_boot_id()):
        if previous.boot_id != boot_id:
            return False
        state = state_if_running(previous.pid, previous.start_ticks)
        return state is not None and not (state in "Tt" and is_silent)
    return not is_silent and _is_running(previous)


def _is_running(driver: Driver) -> bool:
    """Whether this very process is alive, not another one with a reused pid."""
    import psutil

    try:
        process = psutil.Process(driver.pid)
        started_at: float = process.create_time()
        return abs(started_at - driver.pid_started_at) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
