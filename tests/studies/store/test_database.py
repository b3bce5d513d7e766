"""Opening study databases: wrong URLs, broken files, upgrades."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from autosft.profiles.errors import MissingExtraError, UserError
from autosft.studies.search.dimensions import Fixed
from autosft.studies.store import database
from autosft.studies.store.database import connect, parse_url, upgrade
from autosft.studies.store.records import default_storage_url, open_records
from autosft.studies.store.tables import VERSION_TABLE, metadata
from tests.studies.study_examples import opened, space, spec

WRONG_URLS = {
    "a path": ("studies.db", "is not a database URL"),
    "nothing": ("", "is not a database URL"),
    "no file": ("sqlite://", "names no file"),
    "memory": ("sqlite:///:memory:", "names no file"),
    "another kind": ("mysql://user@host/db", "mysql is not supported"),
    "missing folder": ("sqlite:////no/such/folder/studies.db", "/no/such/folder, does not exist"),
    "a folder": ("sqlite:////tmp", "is a folder"),
    "no server": ("postgresql://nobody@127.0.0.1:1/none", "127.0.0.1"),
}


@pytest.mark.parametrize("case", WRONG_URLS)
def test_a_wrong_url_is_explained(case: str) -> None:
    url, said = WRONG_URLS[case]
    with pytest.raises(UserError, match=said) as raised:
        open_records(url)
    assert raised.value.remedy


def test_a_password_is_never_shown() -> None:
    with pytest.raises(UserError) as raised:
        open_records("postgresql://nobody:secret@127.0.0.1:1/none")
    assert "secret" not in str(raised.value)


def test_postgresql_without_its_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"autosft\[postgres\]"):
        parse_url("postgresql://user@host/db")


BROKEN_FILES = {
    "text": lambda path: path.write_text("this is not a database at all\n" * 100),
    "half a database": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "overwritten": lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 200_000),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_explained_and_left_as_it_is(case: str, sqlite_url: str, tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    BROKEN_FILES[case](path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"studies\.db") as raised:
        open_records(sqlite_url).open_study(spec(), now=0.0)
    assert raised.value.remedy
    assert path.read_bytes() == before


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE customers (name TEXT)")
    other.close()
    with pytest.raises(UserError, match="table customers"):
        open_records(f"sqlite:///{path}")


AS_NOBODY = """
import os, sys
from autosft.profiles.errors import UserError
from autosft.studies.store.records import open_records
open_records(sys.argv[1]).close()  # imports what is imported late, before it cannot be read any more
os.setgid(65534); os.setuid(65534)
try:
    open_records(sys.argv[2])
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changing the user needs root")
@pytest.mark.parametrize("read_only", ["file", "folder"])
def test_a_read_only_database_is_explained(read_only: str, empty_sqlite: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # another user cannot get into pytest's own folders
        check_read_only(Path(folder), read_only, empty_sqlite)


def check_read_only(place: Path, read_only: str, empty_sqlite: Path) -> None:
    shutil.copy(empty_sqlite, place / "studies.db")
    place.chmod(0o777 if read_only == "file" else 0o555)
    (place / "studies.db").chmod(0o444 if read_only == "file" else 0o666)
    told = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, f"sqlite:///{empty_sqlite}", f"sqlite:///{place}/studies.db"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "read-only for this user" in told


def test_the_default_storage_is_made_in_the_users_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    url = default_storage_url()
    assert url == f"sqlite:///{tmp_path}/data/autosft/studies.db"
    open_records(url).close()


# Schema


def test_the_migrations_make_the_tables_that_the_code_uses(url: str) -> None:
    engine = connect(parse_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "version_table": VERSION_TABLE,
                "compare_type": True,
                "include_name": lambda name, kind, _: kind != "table" or name.startswith("autosft"),
            },
        )
        assert compare_metadata(context, metadata) == []
    engine.dispose()


NEXT_REVISION = """
import sqlalchemy as sa
from alembic import op
revision = "9999"
down_revision = "{head}"
def upgrade():
    op.add_column("autosft_studies", sa.Column("note", sa.Text))
    {then}
"""


def with_next_revision(tmp_path: Path, then: str = "") -> Path:
    """Return a copy of the migrations with one more of the future."""
    migrations = shutil.copytree(database._MIGRATIONS, tmp_path / "migrations")
    head = database.migration_scripts(migrations)[1].get_current_head()
    (migrations / "versions" / "v9999_note.py").write_text(NEXT_REVISION.format(then=then, head=head))
    return migrations


def test_an_older_database_is_upgraded_after_a_copy(sqlite_url: str, tmp_path: Path) -> None:
    records = open_records(sqlite_url)
    study = opened(records)
    trial = study.ask(now=1.0)
    records.close()
    engine = connect(parse_url(sqlite_url))
    upgrade(engine, migrations=with_next_revision(tmp_path))
    with engine.connect() as connection:
        assert connection.scalar(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")) == "9999"
        assert connection.scalar(sa.text("SELECT note FROM autosft_studies")) is None
    engine.dispose()
    copy = open_records(f"sqlite:///{tmp_path / 'studies.db.before-9999'}")
    assert copy.read_study("study").trials() == (trial,)
    copy.close()


def test_an_upgrade_that_fails_leaves_the_database_as_it_was(url: str, tmp_path: Path) -> None:
    engine = connect(parse_url(url))
    with pytest.raises(RuntimeError, match="in the middle"):
        upgrade(engine, migrations=with_next_revision(tmp_path, then="raise RuntimeError('in the middle')"))
    engine.dispose()
    records = open_records(url)
    opened(records).ask(now=0.0)
    records.close()


def test_a_newer_database_is_refused(url: str, tmp_path: Path) -> None:
    engine = connect(parse_url(url))
    upgrade(engine, migrations=with_next_revision(tmp_path))
    engine.dispose()
    with pytest.raises(UserError, match=r"newer autosft \(schema 9999\)") as raised:
        open_records(url)
    assert "pip install --upgrade autosft" in str(raised.value)


def test_a_newer_optuna_is_refused(sqlite_url: str, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0'")
    connection.close()
    records = open_records(sqlite_url)
    with pytest.raises(UserError, match=r"newer Optuna \(schema v99\.0\.0\)"):
        records.open_study(spec(), now=0.0)
    records.close()


# Databases of earlier releases: released/<revision>.sql holds one study of four trials as that release wrote
# it (`sqlite3 studies.db .dump`).  A new schema adds a file; the old ones are never changed.

RELEASED = sorted((Path(__file__).parents[1] / "released").glob("*.sql"))


def released(tmp_path: Path, dump: Path) -> str:
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        connection.executescript(dump.read_text(encoding="utf-8"))
    connection.close()
    return f"sqlite:///{tmp_path / 'studies.db'}"


@pytest.mark.parametrize("dump", RELEASED, ids=lambda dump: dump.stem)
def test_a_database_of_an_earlier_release_is_read_and_resumed(dump: Path, tmp_path: Path) -> None:
    records = open_records(released(tmp_path, dump))
    assert len(list(tmp_path.glob("studies.db.before-*"))) == 1
    # Its optimizer was the default then; `recorded_optimizer` goes on with it.
    study = opened(records, now=1000.0, space=space(optimizer=Fixed(value="adamw_torch")))
    assert [trial.state.value for trial in study.trials()] == [
        "completed",
        "stopped",
        "infeasible",
        "waiting",
    ]
    assert [trial.value for trial in study.trials()] == [1.5, 2.0, 1.2, None]
    assert [len(study.progress(number)) for number in range(4)] == [2, 2, 2, 0]
    assert len(study.checkpoints()) == 3
    assert len(records.memory_observations()) == 3
    assert study.scores() == ()
    assert study.ask(now=1001.0).number == 4
    records.close()


@pytest.mark.parametrize("revision", ["v1.3.0.a", "v2.6.0.a", "v3.0.0.a"])
def test_an_older_optunas_tables_are_upgraded_by_optuna_after_a_copy(revision: str, tmp_path: Path) -> None:
    """The older tables are made by Optuna's own revisions, beside a study of ours."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    make_optuna_tables(url, revision)
    records = open_records(url)
    study = opened(records)
    study.ask(now=1.0)
    records.close()
    import optuna

    assert [trial.state.name for trial in optuna.load_study(study_name="study", storage=url).trials] == [
        "RUNNING"
    ]
    [copy] = tmp_path.glob("studies.db.before-optuna-*")
    with sqlite3.connect(copy) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(revision,)]
    connection.close()


def make_optuna_tables(url: str, revision: str) -> None:
    import optuna
    from alembic import command
    from alembic.config import Config

    config = Config()
    folder = Path(optuna.__file__).parent / "storages" / "_rdb" / "alembic"
    config.set_main_option("script_location", str(folder))
    config.set_main_option("sqlalchemy.url", url)
    command.upgrade(config, revision)
