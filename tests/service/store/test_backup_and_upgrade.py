"""Backing a queue up while it is used, and upgrading a database from before there was one."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from autosft.service.store.queue_store import QueueStore, open_queue
from autosft.service.values import ItemState
from autosft.studies.store.records import open_records
from autosft.studies.store.tables import VERSION_TABLE
from tests.service.examples import NOW, process, submission

RELEASED = Path(__file__).parents[2] / "released"
COMMITS = sorted(path.name for path in RELEASED.iterdir() if (path / "studies.sql").exists())
NUM_BEFORE = 20


@contextmanager
def used(queue: QueueStore) -> Iterator[None]:
    """Submit, start nothing, hold and release without a pause until the end of the block."""
    for number in range(NUM_BEFORE):
        queue.submit(submission(f"before-{number}"), key=f"before-{number}", now=NOW)
    is_over = threading.Event()

    def use() -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            item, _ = queue.submit(submission(f"meanwhile-{number}"), key=f"meanwhile-{number}", now=NOW)
            queue.hold(item.id, now=NOW)
            queue.release(item.id, now=NOW)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def check_copy(url: str) -> None:
    """Assert that a copy is the queue at one moment of its use, and can be served."""
    with closing(open_queue(url)) as copy:
        items = copy.items()
        assert [item.id for item in items] == list(range(1, len(items) + 1))
        assert [item.name for item in items[:NUM_BEFORE]] == [f"before-{n}" for n in range(NUM_BEFORE)]
        assert {item.state for item in items} <= {ItemState.WAITING, ItemState.HELD}
        again, is_new = copy.submit(submission("before-3"), key="before-3", now=NOW)
        assert (again.id, is_new) == (4, False)
        assert copy.take_over(process(), now=NOW) == 1


def by_python(source: Path, copy: Path) -> None:
    """What `sqlite3 FILE ".backup COPY"` does."""
    with closing(sqlite3.connect(source)) as connection, closing(sqlite3.connect(copy)) as other:
        connection.backup(other)


def by_program(source: Path, copy: Path) -> None:
    subprocess.run(["sqlite3", str(source), f".backup {copy}"], check=True)


needs_program = pytest.mark.skipif(shutil.which("sqlite3") is None, reason="there is no sqlite3 here")


@pytest.mark.parametrize("back_up", [by_python, pytest.param(by_program, marks=needs_program)])
def test_a_sqlite_queue_is_copied_while_it_is_used(
    back_up: Callable[[Path, Path], None], tmp_path: Path, sqlite_url: str
) -> None:
    copy = tmp_path / "studies-copy.db"
    with closing(open_queue(sqlite_url)) as queue, used(queue):
        back_up(Path(sqlite_url.removeprefix("sqlite:///")), copy)
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    check_copy(f"sqlite:///{copy}")


def test_a_postgresql_queue_is_dumped_while_it_is_used(postgres_server: Any, tmp_path: Path) -> None:
    import pgserver

    programs = Path(pgserver.__file__).parent / "pginstall" / "bin"
    if not (programs / "pg_dump").exists():
        pytest.skip("this PostgreSQL has no pg_dump")
    for name in ("dumped", "restored"):
        postgres_server.psql(f"CREATE DATABASE {name};")
    urls = {name: str(postgres_server.get_uri(database=name)) for name in ("dumped", "restored")}
    script = tmp_path / "queue.sql"
    with closing(open_queue(urls["dumped"])) as queue, used(queue), script.open("w") as file:
        subprocess.run([programs / "pg_dump", urls["dumped"]], stdout=file, check=True, env=dict(os.environ))
    subprocess.run(
        [programs / "psql", "--quiet", "--set", "ON_ERROR_STOP=1", "--file", str(script), urls["restored"]],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    check_copy(urls["restored"])


@pytest.mark.parametrize("commit", COMMITS)
def test_a_released_database_becomes_a_queue_and_goes_back(commit: str, tmp_path: Path) -> None:
    file = tmp_path / "studies.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript((RELEASED / commit / "studies.sql").read_text())
    before = revision(file)
    with closing(open_records(f"sqlite:///{tmp_path / 'other.db'}")):
        now = revision(tmp_path / "other.db")
    with closing(open_queue(f"sqlite:///{file}")) as queue:
        assert queue.items() == ()
        queue.submit(submission("new"), now=NOW)
        assert [item.name for item in queue.items()] == ["new"]
    assert revision(file) == now != before
    with closing(open_records(f"sqlite:///{file}")) as records:
        names = {study.spec.name for study in records.studies()}
    assert names
    [copy] = tmp_path.glob("studies.db.before-*")
    assert revision(copy) == before
    for rest in tmp_path.glob("studies.db-*"):  # of the newer version's connections
        rest.unlink()
    shutil.copy(copy, file)  # going back
    assert revision(file) == before
    with closing(open_records(f"sqlite:///{file}")) as records:  # and forward again
        assert {study.spec.name for study in records.studies()} == names


def revision(file: Path) -> str:
    with closing(sqlite3.connect(file)) as connection:
        [[found]] = connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall()
    return str(found)
