"""What a driver's lease writes, and when: heartbeats, ends and replacements, of this driver and no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import sqlalchemy as sa

from autosft.studies.store import tables
from autosft.studies.store.driver_lease import HEARTBEAT_TIMEOUT_S, Lease, lives
from autosft.studies.store.records import Records, open_records
from autosft.studies.values import Driver
from tests.studies.study_examples import driver, opened, spec


@pytest.fixture
def records(sqlite_url: str) -> Iterator[Records]:
    made = open_records(sqlite_url)
    yield made
    made.close()


def rows(records: Records) -> list[tuple[float, float | None]]:
    """Return heartbeat and end of each driver, in the order in which they came."""
    columns = tables.drivers.c.heartbeat_at, tables.drivers.c.ended_at
    with records._engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*columns).order_by(tables.drivers.c.id))]


def lease_of(records: Records, name: str = "study") -> Lease:
    records.open_study(spec(name=name), now=0.0)
    with records._engine.connect() as connection:
        query = sa.select(tables.studies.c.id).where(tables.studies.c.name == name)
        return Lease(records._engine, study_id=connection.scalar(query), study=name)


def test_a_heartbeat_is_written_every_five_seconds_and_after_a_step_back_of_the_clock(
    records: Records,
) -> None:
    lease = lease_of(records)
    lease.take_over(driver(1), environment="{}", now=100.0)
    for now, expected in [(100.5, 100.0), (104.9, 100.0), (105.0, 105.0), (109.9, 105.0), (50.0, 50.0)]:
        lease.heartbeat(now=now)
        assert rows(records) == [(expected, None)], now


def test_a_lease_is_held_from_taking_over_until_it_is_released_or_taken(records: Records) -> None:
    lease, other = lease_of(records), lease_of(records)
    assert not lease.is_held()
    lease.take_over(driver(1), environment="{}", now=0.0)
    assert lease.is_held()
    other.take_over(driver(2), environment="{}", now=HEARTBEAT_TIMEOUT_S + 1)
    assert not lease.is_held()
    assert other.is_held()
    other.release(now=100.0)
    assert not other.is_held()


def test_a_release_ends_this_driver_once_and_no_other(records: Records) -> None:
    lease = lease_of(records)
    opened(records, now=1.0, name="another")
    lease.take_over(driver(1), environment="{}", now=2.0)
    lease.release(now=3.0)
    lease.release(now=4.0)
    assert rows(records) == [(1.0, None), (2.0, 3.0)]


def test_a_dead_driver_ended_with_its_last_heartbeat(records: Records) -> None:
    opened(records, now=1.0, name="another")
    first, second = lease_of(records), lease_of(records)
    first.take_over(driver(1), environment="{}", now=2.0)
    first.heartbeat(now=20.0)
    second.take_over(driver(2), environment="{}", now=20.0 + HEARTBEAT_TIMEOUT_S + 1)
    assert rows(records) == [(1.0, None), (20.0, 20.0), (81.0, None)]


def test_a_driver_of_another_machine_lives_until_it_has_been_silent_for_longer() -> None:
    for silent_s, expected in [(HEARTBEAT_TIMEOUT_S, True), (HEARTBEAT_TIMEOUT_S + 0.1, False)]:
        assert lives(driver(1), silent_s=silent_s, driver=driver(2)) is expected


def of_before(started_s_later: float) -> Driver:
    """Return this process as an earlier version recorded it, without ticks, started so much later."""
    started = psutil.Process(os.getpid()).create_time()
    return replace(Driver.current(), start_ticks=None, pid_started_at=started + started_s_later)


@pytest.mark.parametrize(("later_s", "expected"), [(0.0, True), (1.5, True), (2.5, False), (-2.5, False)])
def test_a_process_of_before_is_known_by_when_it_started(later_s: float, expected: bool) -> None:
    assert lives(of_before(later_s), silent_s=0.0, driver=None) is expected


def test_a_process_that_may_not_be_looked_at_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: psutil.Process) -> float:
        raise psutil.AccessDenied

    known = of_before(0.0)
    monkeypatch.setattr(psutil.Process, "create_time", refuse)
    assert lives(known, silent_s=0.0, driver=known)
