"""Read records from tables: comma- and tab-separated files, Parquet and Arrow."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from autosft.profiles.dataset.columns import KEYS, NOT_READ, READ
from autosft.profiles.dataset.files import is_compressed, open_bytes, read_text
from autosft.profiles.dataset.marks import may_mark
from autosft.profiles.dataset.problems import BadRecord, brief
from autosft.profiles.dataset.record import Record
from autosft.profiles.errors import UserError

Found = Iterator[Record | BadRecord]


def csv_records(path: Path) -> Found:
    """Read a file with a header; a row must have as many fields as the header.

    The header determines the separator: commas, semicolons (Excel in much of Europe), or tabs.
    Columns without a name, such as the index that pandas writes, are not read.
    """
    text = _without_hint(read_text(path))
    yield from _separated(path, text, _delimiter(text.lstrip()))


def _without_hint(text: str) -> str:
    """Blank the line `sep=;` that sets the delimiter for Excel; line numbers do not change."""
    return re.sub(r"\A(\"?)sep=[,;\t|]\1(?=\r?\n)", "", text, count=1, flags=re.IGNORECASE)


def tsv_records(path: Path) -> Found:
    """Read a tab-separated file with a header, like `csv_records`.

    Some programs quote fields in such files, others never do (IANA's text/tab-separated-values): quotes are
    part of the text if rows have as many fields as the header only without quoting.
    """
    text = read_text(path)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
    if not _has_even_rows(text, csv.QUOTE_MINIMAL) and _has_even_rows(text, csv.QUOTE_NONE):
        quoting = csv.QUOTE_NONE
    yield from _separated(path, text, "\t", quoting)


def _has_even_rows(text: str, quoting: Literal[0, 3]) -> bool:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter="\t", quoting=quoting)
    try:
        return len({len(row) for row in rows if row}) == 1
    except csv.Error:
        return False


def _delimiter(text: str) -> str:
    """Return the delimiter of the header: a comma, unless only another one gives more than one column."""

    def num_columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text[:10_000], newline=""), delimiter=delimiter), ()))
        except csv.Error:
            return 0

    return "," if num_columns(",") > 1 else max(",;\t|", key=num_columns)


def _separated(path: Path, text: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> Found:
    csv.field_size_limit(sys.maxsize)  # the default limit is 128 KiB per field
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter, quoting=quoting)
    header: list[str] = []
    line = 1
    try:
        for row in rows:
            where, line = f"{path} line {line}", rows.line_num + 1
            if not row:
                continue
            if not header:
                header = _known_case([name.strip() for name in row])
                named = [name for name in header if name]
                if len(set(named)) < len(named) or not named:
                    raise UserError(
                        f"{where}: the header needs a name of its own for every column, "
                        f"not {brief(', '.join(header))}."
                    )
            elif len(row) != len(header):
                yield BadRecord(
                    where=where,
                    reason="wrong number of fields",
                    detail=f"{len(row)}, header has {len(header)}",
                )
            else:
                columns = list(zip(header, row, strict=True))
                fields = {name: _given(name, value) for name, value in columns if name}
                if len(fields) < len(columns):
                    fields["(without a name)"] = "".join(value for name, value in columns if not name)
                yield Record(where=where, fields=fields)
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: broken CSV: {error}.") from error


def _given(name: str, value: str) -> str:
    """Return a field, empty where a column that may be missing has the word that pandas writes for that."""
    return "" if name in _MAY_BE_MISSING and value.strip().lower() in _MISSING else value


def _known_case(header: list[str]) -> list[str]:
    """Return a header's names in small letters if only that way a format is recognised ("Prompt")."""
    small = [name.lower() for name in header]
    is_known = any(columns <= set(header) for columns in KEYS)
    return small if not is_known and any(columns <= set(small) for columns in KEYS) else header


def parquet_records(path: Path, columns: frozenset[str] = frozenset()) -> Found:
    """Read the columns of a Parquet file that a format could use, and `columns`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(_whole(path) if is_compressed(path) else path)
        names = file.schema_arrow.names
        used = [name for name in names if name in READ | columns or may_mark(name)]
        # The first column alone gives the number of rows.
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=used or names[:1])
        yield from _rows(path, batches, names, used)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {brief(str(error), 300)}") from error


def arrow_records(path: Path, columns: frozenset[str] = frozenset()) -> Found:
    """Read a file of Arrow's IPC format, as `datasets` saves them, like `parquet_records`."""
    import pyarrow as pa

    try:
        source = _whole(path) if is_compressed(path) else pa.memory_map(str(path))
        try:
            reader = pa.ipc.open_stream(source)
            batches: Iterable[Any] = reader
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        names = reader.schema.names
        used = [name for name in names if name in READ | columns or may_mark(name)]
        small = (
            batch.slice(start, _BATCH_ROWS)
            for batch in batches
            for start in range(0, batch.num_rows, _BATCH_ROWS)
        )
        yield from _rows(path, small, names, used)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Arrow file: {brief(str(error), 300)}") from error


def _rows(path: Path, batches: Iterable[Any], names: list[str], used: list[str]) -> Found:
    number = 0
    unread = dict.fromkeys((name for name in names if name not in used), NOT_READ)
    for batch in batches:
        for row in _values(batch.select(used)) if used else ({} for _ in range(batch.num_rows)):
            number += 1
            where = f"{path} row {number}"
            if isinstance(row, Exception):
                yield BadRecord(
                    where=where, reason="a value that cannot be read", detail=brief(str(row), 100)
                )
            else:
                # pandas keeps a column in which values are missing as numbers, with NaN for these.
                given = {name: _without_nan(value) for name, value in row.items()}
                yield Record(where=where, fields={**unread, **given}, fills_nulls=True)


def _without_nan(value: Any) -> Any:
    """Return a value with None for NaN, at any depth."""
    if isinstance(value, float):
        return None if value != value else value  # noqa: PLR0124
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list) else value


def _values(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """Yield the rows of a batch as Python values, or an error for a row that Python cannot represent."""
    import pyarrow as pa

    unreadable = (ValueError, OverflowError, pa.ArrowException)
    try:
        yield from batch.to_pylist(maps_as_pydicts="lossy")
    except unreadable:
        for position in range(batch.num_rows):
            try:
                yield from batch.slice(position, 1).to_pylist(maps_as_pydicts="lossy")
            except unreadable as error:
                yield error


def _whole(path: Path) -> Any:
    import pyarrow as pa

    with open_bytes(path) as stream:
        return pa.BufferReader(stream.read())


_MAY_BE_MISSING = READ - frozenset().union(*KEYS)
_MISSING = frozenset({"nan", "none", "null", "<na>"})
_BATCH_ROWS = 256  # texts may have megabytes each
