"""Opening the study database: URLs, connections, schema upgrades, and readable errors."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError

from autosft.profiles.errors import MissingExtraError, StudyFailedError, UserError
from autosft.profiles.masking import masked
from autosft.profiles.own_folders import data_folder
from autosft.studies.store.tables import VERSION_TABLE

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

logger = logging.getLogger(__name__)


class DatabaseError(UserError):
    """The study database cannot be used: it does not answer, is damaged, full or read-only."""


_MIGRATIONS = Path(__file__).parents[1] / "migrations"

#: How long a writer waits for another, which write for milliseconds, before the user is told: SQLite itself
#: waits without a word.
QUIET_S = 5.0

#: How long a study waits for an unavailable database: a restart, a failover.
AWAY_S = 90.0
RETRY_S = 0.5

_REMEDY = "Pass --storage sqlite:///FILE or --storage postgresql://USER@HOST/DATABASE."


def default_storage_url() -> str:
    """Return the URL of the SQLite file in the user's data folder, creating the folder if necessary."""
    folder = data_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The data folder {folder} cannot be created: {error.strerror}.", remedy=_REMEDY
        ) from error
    # As a URL: a question mark or a per cent sign in the folder's name has a meaning there.
    return URL.create("sqlite", database=str(folder / "studies.db")).render_as_string()


def parse_url(url: str) -> URL:
    """Return `url` with its driver filled in and a SQLite path made absolute.

    Raises UserError for anything but a SQLite file or PostgreSQL, and MissingExtraError if the driver of
    PostgreSQL is not installed.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UserError(f"{masked(url)!r} is not a database URL.", remedy=_REMEDY) from error
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
            raise UserError(f"{url!r} names no file, so nothing would be kept.", remedy=_REMEDY)
        path = str(Path(parsed.database).expanduser().absolute())
        return parsed.set(drivername="sqlite", database=path)
    if backend in ("postgresql", "postgres"):
        if importlib.util.find_spec("psycopg") is None:
            raise MissingExtraError(what="A PostgreSQL study database", extra="postgres")
        return parsed.set(drivername="postgresql+psycopg")
    raise UserError(f"{backend} is not supported as study database.", remedy=_REMEDY)


def display(url: URL) -> str:
    """Return the URL without its password, for display."""
    return url.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)


def connect(url: URL) -> Engine:
    """Return an engine whose write transactions never overlap, after checking that the location is usable."""
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)  # replaces connections from before a restart
    _check_file(Path(url.database or ""))
    # All connections are kept: one that is opened for a moment and closed again costs more than a query.
    engine = sa.create_engine(url, connect_args={"timeout": QUIET_S}, pool_size=15, max_overflow=0)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        prepare_sqlite(connection)
        connection.isolation_level = None  # SQLAlchemy issues BEGIN below; sqlite3 must not issue its own

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails at once if another has written in between.
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")

    return engine


@contextlib.contextmanager
def begin(engine: Engine) -> Iterator[Connection]:
    """Begin a transaction, waiting up to AWAY_S for a database that is unavailable or locked.

    Retrying is safe, since nothing has been executed yet.  Later errors are raised: whether a commit arrived
    is not known then, and the next run finds out by reading everything again.
    """
    deadline = time.monotonic() + AWAY_S
    has_told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                connection = stack.enter_context(engine.begin())
            except OperationalError as error:
                if time.monotonic() >= deadline:
                    raise
                if not has_told:
                    has_told = True
                    told = str(error.orig).strip().splitlines()[0]
                    logger.warning(
                        "Waiting up to %.0f s for the study database %s: %s.",
                        AWAY_S,
                        display(engine.url),
                        told,
                    )
                time.sleep(RETRY_S)
            else:
                break
        yield connection


def file_identity(engine: Engine) -> tuple[int, int] | None:
    """Return what tells a SQLite file from another one of its name; None for a server's database.

    Raises StudyFailedError where the file is gone.
    """
    if engine.url.get_backend_name() != "sqlite":
        return None
    try:
        found = Path(str(engine.url.database)).stat()
    except OSError as error:
        raise StudyFailedError(
            f"The study database {display(engine.url)} was deleted or moved while the study ran "
            f"({error.strerror}): nothing can be recorded. Put it back, and run the same command again."
        ) from error
    return found.st_dev, found.st_ino


def require_same_file(engine: Engine, identity: tuple[int, int] | None) -> None:
    """Raise StudyFailedError where a SQLite file is no longer the one that was opened.

    The open file would take every write, and nobody would ever see them.
    """
    if file_identity(engine) != identity:
        raise StudyFailedError(
            f"The study database {display(engine.url)} was replaced while the study ran: what has been "
            "recorded since is not in the new file. Put the old one back, or start again with it."
        )


def prepare_sqlite(connection: sqlite3.Connection) -> None:
    """Set SQLite's per-connection options, and write-ahead logging, so that readers never block a writer.

    In this mode synchronous=NORMAL loses at most the last transactions in a power cut, and nothing if a
    process is killed; FULL would wait for the disk at each of a trial's commits.
    """
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def optuna_engine_kwargs(url: URL) -> dict[str, Any]:
    """Return engine options that make Optuna's own connections behave like ours."""
    if url.get_backend_name() != "sqlite":
        return {}

    def create() -> sqlite3.Connection:
        connection = sqlite3.connect(str(url.database), timeout=QUIET_S, check_same_thread=False)
        prepare_sqlite(connection)
        return connection

    return {"creator": create}


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"The study database {path} is a folder.", remedy="Name a file inside it.")
    if not path.parent.is_dir():
        raise UserError(
            f"The folder of the study database, {path.parent}, does not exist.", remedy="Create it."
        )
    # WAL creates two more files next to the database.
    for place in (path, path.parent):
        if place.exists() and not os.access(place, os.R_OK | os.W_OK):
            raise UserError(
                f"The study database {path} cannot be written: {place} is read-only for this user.",
                remedy="Make it writable, or choose another with --storage.",
            )


@contextlib.contextmanager
def readable_errors(url: URL) -> Iterator[None]:
    """Turn database errors into UserErrors; programming errors in our SQL pass unchanged."""
    try:
        yield
    except UnicodeDecodeError as error:  # of names that SQLite reports an error about
        raise DatabaseError(
            f"The study database {display(url)} is damaged: {error}.", remedy=_KNOWN_ERRORS["malformed"]
        ) from error
    except sa.exc.TimeoutError as error:
        raise DatabaseError(
            f"The study database {display(url)} does not answer: all connections are in use.",
            remedy="Check that its server runs, then try again.",
        ) from error
    except (DBAPIError, sqlite3.DatabaseError) as error:
        told = str(getattr(error, "orig", None) or error).strip()
        for pattern, remedy in _KNOWN_ERRORS.items():
            if re.search(pattern, told, re.IGNORECASE):
                first_line = told.splitlines()[0] + _cause(url)
                said = f"The study database {display(url)}: {first_line}."
                raise DatabaseError(said, remedy=remedy) from error
        if getattr(error, "connection_invalidated", False):  # a server ended it, in whatever words
            said = f"The study database {display(url)}: {(told or 'connection lost').splitlines()[0]}."
            raise DatabaseError(said, remedy=_RUN_AGAIN) from error
        raise


def _cause(url: URL) -> str:
    """Return what the system says of writing where a SQLite file is, in brackets; "" where that goes well.

    SQLite calls a disk that turned read-only under an open file an I/O error.
    """
    if url.get_backend_name() == "sqlite":
        try:
            with tempfile.TemporaryFile(dir=Path(str(url.database)).parent, buffering=0) as probe:
                probe.write(b"1")
        except OSError as error:
            return f" ({error.strerror})"
    return ""


@contextlib.contextmanager
def readable_rows(url: URL) -> Iterator[None]:
    """Turn what reading a row raises into a UserError: who wrote it is not known."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"The study database {display(url)} holds a study that cannot be read "
            f"({type(error).__name__}: {said}).",
            remedy="It is damaged, or was changed by something else: restore it from a copy, or choose "
            "another with --storage.",
        ) from error


_RUN_AGAIN = "Check that the server runs, then run the same command again."
_KNOWN_ERRORS = {
    "not a database": "Choose another file with --storage; this one is not a database.",
    "unsupported file format|file is encrypted": "It is damaged: choose another with --storage.",
    "no such (table|column)": "It is damaged, or was changed by something else: restore it from a copy.",
    "malformed": "Restore it from a copy (backups are next to it), or choose another with --storage.",
    "readonly": "Make the file and its folder writable, or choose another with --storage.",
    "unable to open": "Check that the file and its folder can be read and written.",
    "disk i/o error": "Check the disk; network drives often cannot hold SQLite files.",
    "disk is full": "Make space on the disk, then run the same command again: nothing is lost.",
    "locked": f"Another process has kept it locked for {AWAY_S:.0f} s; end it, or use PostgreSQL.",
    "connection failed": "Check host, port and that the server runs.",
    "connection refused": "Check host, port and that the server runs.",
    "connection to server": "Check host, port, user and that the server runs.",
    "the database system is|terminating connection|server closed the connection": _RUN_AGAIN,
    "the connection is closed": _RUN_AGAIN,
    "password": "Check user and password.",
    '(database|role) ".*" does not exist': "Check the names of database and user.",
    "permission denied": "The user needs the right to create tables in this database.",
}


# --- schema ---------------------------------------------------------------------------------------


def upgrade(engine: Engine, *, migrations: Path = _MIGRATIONS) -> None:
    """Bring our tables to this version's schema, creating them if necessary.

    Runs in one transaction, after copying a SQLite file to FILE.before-REVISION (backing up PostgreSQL is
    left to its administrator).  Raises UserError if the schema is newer than this version supports, or if the
    database belongs to another program.
    """
    config, script = migration_scripts(migrations)
    head = script.get_current_head()
    current = _current_revision(engine)
    if current == head:
        return
    known = {revision.revision for revision in script.walk_revisions()}
    place = display(engine.url)
    if current is not None and current not in known:
        raise UserError(
            f"The study database {place} was written by a newer autosft (schema {current}).",
            remedy="Update this one: pip install --upgrade autosft",
        )
    if current is None:
        _refuse_foreign(engine)
    else:
        _back_up(engine, label=f"before-{head}")
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # with SQLite, BEGIN IMMEDIATE has locked already
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7365746)")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def migration_scripts(migrations: Path) -> tuple[Config, ScriptDirectory]:
    """Return alembic's configuration for a folder of migrations."""
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    return config, ScriptDirectory.from_config(config)


def _current_revision(engine: Engine) -> str | None:
    with engine.connect().execution_options(reading=True) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        return context.get_current_revision()


def _refuse_foreign(engine: Engine) -> None:
    """Refuse a database with tables that are neither ours nor Optuna's: most likely a wrong name."""
    with engine.connect().execution_options(reading=True) as connection:
        tables = sa.inspect(connection).get_table_names()
    is_optunas = {"version_info", "studies", "trials", "trial_params"} <= set(tables)
    if tables and VERSION_TABLE not in tables and not is_optunas:
        raise UserError(
            f"The database {display(engine.url)} belongs to another program (table {sorted(tables)[0]}).",
            remedy="Choose another with --storage.",
        )


def _back_up(engine: Engine, *, label: str) -> None:
    if engine.dialect.name != "sqlite":
        return
    path = Path(str(engine.url.database))
    copy = path.with_name(f"{path.name}.{label}")
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)


def open_optuna(engine: Engine) -> RDBStorage:
    """Return Optuna's storage in the same database, creating or upgrading its tables.

    Optuna's own upgrade is used, after a copy.  Raises UserError if the tables are newer than the installed
    Optuna supports.
    """
    from optuna.storages import RDBStorage

    from autosft.studies.search.sampling import quieten

    quieten()
    url = engine.url
    with readable_errors(url):
        with begin(engine):  # says what it waits for, which Optuna does not
            pass
        storage = RDBStorage(
            url.render_as_string(hide_password=False),
            optuna_engine_kwargs(url),
            skip_compatibility_check=True,
        )
        current, head = storage.get_current_version(), storage.get_head_version()
        if current != head:
            if current not in storage.get_all_versions():
                raise UserError(
                    f"The study database {display(url)} was written by a newer Optuna (schema {current}).",
                    remedy="Update it: pip install --upgrade optuna",
                )
            _back_up(engine, label=f"before-optuna-{head}")
            storage.upgrade()
    return storage
