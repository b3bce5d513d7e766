"""Read the records of a data file, each with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from autosft.profiles.dataset.content_kind import recognised_kind
from autosft.profiles.dataset.files import SUPPORTED, read_text
from autosft.profiles.dataset.json_records import json_records, jsonl_records
from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.tables import arrow_records, csv_records, parquet_records, tsv_records
from autosft.profiles.errors import UserError

Found = Iterator[Record | BadRecord]


def records_of(path: Path, columns: frozenset[str] = frozenset()) -> Found:
    """Read the records of a file in order; from a columnar file also the unknown columns `columns`.

    Raises `UserError` where the file cannot be read further.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty.", remedy=f"Expected {SUPPORTED}.")
        kind = recognised_kind(path)
        assert kind is not None, "a file of no kind is refused when it is chosen"
        if kind in _COLUMNAR:
            yield from _COLUMNAR[kind](path, columns)
        else:
            yield from _READERS[kind](path)
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


def _text_records(path: Path) -> Found:
    yield Record(where=f"{path} line 1", fields={"text": read_text(path)})


_READERS: dict[str, Callable[[Path], Found]] = {
    ".json": json_records,
    ".jsonl": jsonl_records,
    ".csv": csv_records,
    ".tsv": tsv_records,
    ".txt": _text_records,
}
_COLUMNAR: dict[str, Callable[[Path, frozenset[str]], Found]] = {
    ".parquet": parquet_records,
    ".arrow": arrow_records,
}
