"""Study databases for tests: a SQLite file, and a real PostgreSQL where the pgserver wheel is installed.

Each test gets a copy of an empty database that was made once.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autosft.studies.store.records import Records, open_records

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def quick_optuna() -> Iterator[None]:
    """Look up the installed Optuna's schema once: it reads and runs eleven files each time."""
    from optuna.storages import RDBStorage

    known: list[str] = []
    look_up = RDBStorage.get_head_version

    def head_version(storage: RDBStorage) -> str:
        if not known:
            known.append(look_up(storage))
        return known[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RDBStorage, "get_head_version", head_version)
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    pgserver = pytest.importorskip("pgserver", reason="the pgserver wheel, a PostgreSQL server, is missing")
    pytest.importorskip("psycopg", reason="psycopg, PostgreSQL's driver, is missing")
    # Run by root, the server belongs to another user, who cannot get into pytest's own folders.
    with tempfile.TemporaryDirectory(prefix="autosft-postgres-") as folder:
        server = pgserver.get_server(folder, cleanup_mode=None)
        server.psql("CREATE DATABASE empty;")
        _make_tables(server.get_uri(database="empty"))
        yield server
        # At once: a shutdown would first write out what nobody needs.
        pgserver.pg_ctl(["-m", "immediate", "stop"], pgdata=server.pgdata, user=server.system_user)


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "empty.db"
    _make_tables(f"sqlite:///{path}")
    return path


def _make_tables(url: str) -> None:
    records = open_records(url)
    records._optuna()
    records.close()


@pytest.fixture
def sqlite_url(tmp_path: Path, empty_sqlite: Path) -> str:
    path = tmp_path / "studies.db"
    shutil.copy(empty_sqlite, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    server = request.getfixturevalue("postgres_server")
    name = f"studies_{next(_numbers)}"
    server.psql(f"CREATE DATABASE {name} TEMPLATE empty;")
    return str(server.get_uri(database=name))


@pytest.fixture
def records(url: str) -> Iterator[Records]:
    opened = open_records(url)
    yield opened
    opened.close()
