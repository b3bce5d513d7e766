"""Existing study databases: reading never creates one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.studies.store.database import default_storage_url, parse_url
from autosft.studies.store.records import Records, open_records
from autosft.studies.store.study_records import StudyRecords


def existing_database(storage: str | None) -> str:
    """Return the URL for SQLAlchemy.  Raises UserError if the SQLite file does not exist."""
    url = parse_url(storage or default_storage_url())
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise UserError(
            f"There is no study database at {url.database}.",
            remedy="autosft tune creates one; --storage URL selects another.",
        )
    return url.render_as_string(hide_password=False)


def reading(storage: str | None) -> closing[Records]:
    """Open an existing database, closed at the end of a `with` block."""
    return closing(open_records(existing_database(storage)))


@contextmanager
def known_studies(storage: str | None) -> Iterator[list[StudyRecords]]:
    """Open every study of the database, none where there is no database.

    Raises UserError where the user has named one that is not there.
    """
    try:
        existing_database(storage)
    except UserError:
        if storage is not None:
            raise
        yield []
        return
    with reading(storage) as records:
        yield [records.read_study(overview.spec.name) for overview in records.studies()]
