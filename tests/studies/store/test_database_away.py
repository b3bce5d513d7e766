"""A database that is away, locked or full stops a study for a while or ends it in words; nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from autosft.profiles.errors import UserError
from autosft.studies.store import database
from autosft.studies.store.records import Records, open_records
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import TrialState
from tests.postgres_again import start_again
from tests.studies.study_examples import end, evaluation, opened, start


class Away:
    """An engine whose database comes back at `until`, on a clock that only sleeping moves."""

    url = make_url("postgresql://ada:s3cret@db/studies")

    def __init__(self, until: float) -> None:
        self.now = 0.0
        self._until = until

    @contextlib.contextmanager
    def begin(self) -> Iterator[str]:
        if self.now < self._until:
            raise OperationalError("BEGIN", {}, Exception("connection refused"))
        yield "connection"

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("away_s", [0, 20, 60])
def test_a_database_that_is_away_for_a_while_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, away_s: float
) -> None:
    engine: Any = Away(away_s)
    monkeypatch.setattr(database, "time", engine)
    with database.begin(engine) as connection:
        assert connection == "connection"
    assert away_s <= engine.now <= away_s + 1


def test_a_database_that_stays_away_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = Away(1e9)
    monkeypatch.setattr(database, "time", engine)
    with pytest.raises(OperationalError), database.begin(engine):
        pass
    assert database.AWAY_S <= engine.now <= database.AWAY_S + 1


def test_what_breaks_inside_a_transaction_is_not_repeated() -> None:
    with pytest.raises(OperationalError, match="deadlock"), database.begin(Away(0)):  # type: ignore[arg-type]
        raise OperationalError("UPDATE", {}, Exception("deadlock"))


# --- real ones ----------------------------------------------------------------------------------------


def goes_on(study: StudyRecords, away: Callable[[], object]) -> None:
    """Have the database go away in the middle of a trial, and see that its result is kept once."""
    trial = study.ask(now=1.0).number
    attempt = start(study, trial)
    away()
    assert study.record(evaluation(trial, attempt, 1), now=2.0)
    assert study.end_attempt(end(trial, attempt), TrialState.COMPLETED, now=3.0)
    assert study.num_finished() == 1
    assert [attempt.outcome for attempt in study.attempts()] == ["completed"]


@pytest.fixture
def own_server() -> Iterator[Any]:
    """Start a PostgreSQL server that this test may stop."""
    pgserver = pytest.importorskip("pgserver", reason="the pgserver wheel, a PostgreSQL server, is missing")
    pytest.importorskip("psycopg", reason="psycopg, PostgreSQL's driver, is missing")
    with tempfile.TemporaryDirectory(prefix="autosft-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode=None)

        def stop() -> None:
            pgserver.pg_ctl(["-m", "immediate", "stop"], pgdata=server.pgdata, user=server.system_user)

        yield SimpleNamespace(url=server.get_uri(), stop=stop, start=lambda: start_again(server))
        stop()


@pytest.mark.slow
def test_a_server_that_is_restarted_costs_a_study_nothing(own_server: Any) -> None:
    records = open_records(own_server.url)

    def restart() -> None:
        own_server.stop()
        threading.Timer(1.0, own_server.start).start()

    try:
        goes_on(opened(records), restart)
    finally:
        records.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_a_server_that_is_lost_within_a_transaction_is_named_and_found_again(
    own_server: Any, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a commit arrived is not known then, so nothing is repeated; the same command goes on."""
    monkeypatch.setattr(database, "AWAY_S", 600.0)  # until it has recovered, on a busy machine
    records = open_records(own_server.url)
    engine = records._engine

    def lose_within_a_transaction() -> None:
        with database.readable_errors(engine.url), database.begin(engine) as connection:
            os.kill(connection.scalar(sa.text("SELECT pg_backend_pid()")), how)
            connection.execute(sa.text("SELECT pg_sleep(60)"))

    try:
        with pytest.raises(UserError, match=r"^The study database postgresql://") as said:
            lose_within_a_transaction()
        assert said.value.remedy == "Check that the server runs, then run the same command again."
        goes_on(opened_again(records), lambda: None)
    finally:
        records.close()


def opened_again(records: Records) -> StudyRecords:
    """Give the same command until the server has recovered: until then it closes what it accepts."""
    for _ in range(600):
        try:
            return opened(records)
        except UserError:
            time.sleep(0.1)
    pytest.fail("the server has not recovered within a minute")


def test_a_file_that_another_program_has_locked_is_waited_for(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "QUIET_S", 0.05)
    monkeypatch.setattr(database, "RETRY_S", 0.05)
    records = open_records(sqlite_url)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), check_same_thread=False)

    def lock() -> None:
        other.execute("BEGIN EXCLUSIVE")
        threading.Timer(0.5, other.rollback).start()

    try:
        goes_on(opened(records), lock)
    finally:
        records.close()
        other.close()


def test_a_full_disk_ends_a_study_with_a_message_and_loses_nothing(sqlite_url: str) -> None:
    records = open_records(sqlite_url)
    limit = {"pages": 1 << 30}

    @event.listens_for(records._engine, "begin")
    def bound(connection: Any) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count={limit['pages']}").close()

    study = opened(records)
    trial = study.ask(now=1.0).number
    attempt = start(study, trial)
    limit["pages"] = 1  # SQLite takes it for as many as there are

    def fill() -> None:
        for step in range(1, 5000):
            study.record(evaluation(trial, attempt, step), now=2.0)

    with pytest.raises(UserError, match="Make space on the disk"):
        fill()
    kept = len(study.progress(trial))
    records.close()

    again = open_records(sqlite_url)
    study = opened(again, number=2, now=1000.0)
    assert [attempt.outcome for attempt in study.attempts()] == ["abandoned"]
    assert len(study.progress(trial)) == kept
    assert study.trial(trial).state is TrialState.WAITING
    assert start(study, trial) == attempt + 1
    again.close()
