"""Reads records from files, folders and the hub, knowing where each one stands."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.hub import hub_answers, looks_like_path
from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record as it stands in the source."""

    where: str  # "alpaca.jsonl line 214", "part-0.parquet row 12"
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where records come from, and a fingerprint of their content."""

    name: str  # as the user gave it
    files: tuple[Path, ...]  # empty for a data set of the hub
    fingerprint: str  # sha256, hex

    def records(self) -> Iterator[Record | BadRecord]:
        """Read all records in order; raise `UserError` where a file cannot be read on."""
        if not self.files:
            yield from _hub_records(self.name)
        for path in self.files:
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty.", remedy=f"Expected {_SUPPORTED}.")
            yield from _READERS[path.suffix.lower()](path)


def open_source(name: str) -> Source:
    """Find a source by path or hub name.

    Raises `UserError` when it is neither a readable file or folder nor a data set that the hub gives.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            files = _files_below(path)
        elif path.exists():
            files = (path,)
        else:
            return Source(name=name, files=(), fingerprint=_hub_fingerprint(name))
        unreadable = [file for file in files if file.suffix.lower() not in _READERS]
        if unreadable:
            raise UserError(
                f"{unreadable[0]}: '{unreadable[0].suffix}' is not a kind of file that can be read.",
                remedy=f"Expected {_SUPPORTED}.",
            )
        return Source(name=name, files=files, fingerprint=files_fingerprint(files))
    except OSError as error:
        raise UserError(f"{error.filename or name} cannot be read: {error.strerror}.") from error


def _files_below(folder: Path) -> tuple[Path, ...]:
    """Return the data files of a folder and its subfolders, by name; a README.md, say, is no data."""
    files = tuple(
        sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in _READERS
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.is_file()
        )
    )
    if not files:
        raise UserError(f"{folder} holds no data file.", remedy=f"Expected {_SUPPORTED} in it.")
    return files


def files_fingerprint(files: tuple[Path, ...]) -> str:
    """Return sha256 (hex) over the kinds and contents of files, in order; not over their names."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(path.suffix.lower().encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _json_records(path: Path) -> Iterator[Record | BadRecord]:
    """Read an array of records, one record, an object around an array of them, or misnamed JSON lines."""
    text = _read_text(path)
    start = _skip_space(text, 0)
    if start == len(text):
        raise UserError(f"{path} is empty.", remedy=f"Expected {_SUPPORTED}.")
    if text[start] == "[":
        end = _skip_space(text, (yield from _array_records(path, text, start)))
        if end < len(text):
            raise _broken_json(path, json.JSONDecodeError("Extra data", text, end))
        return
    if text[start] != "{":
        raise UserError(
            f"{path} line {_line(text, start)}: expected an array or an object of records, "
            f"not {text[start : start + 20]!r}."
        )
    whole, end = _decode(path, text, start)
    if _skip_space(text, end) < len(text):
        yield from _jsonl_records(path)
        return
    arrays = [key for key, value in whole.items() if value and isinstance(value, list)]
    if len(whole) == 1 and arrays and arrays[0] not in _RECORD_LISTS:
        match = re.compile(rf"\s*{re.escape(json.dumps(arrays[0]))}\s*:\s*").match(text, start + 1)
        # The key may be written with other escapes; then the array's lines are not known.
        if match is not None:
            yield from _array_records(path, text, match.end())
            return
    yield Record(where=f"{path} line {_line(text, start)}", fields=whole)


def _array_records(path: Path, text: str, start: int) -> Generator[Record | BadRecord, None, int]:
    """Read the array that starts at `start` record by record, counting lines; return where it ends."""
    position, counted, line = _skip_space(text, start + 1), 0, 1
    if text[position : position + 1] == "]":
        return position + 1
    while True:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decode(path, text, position)
        where = f"{path} line {line}"
        if isinstance(value, dict):
            yield Record(where=where, fields=value)
        else:
            yield BadRecord(where=where, reason="not an object", detail=_brief(value))
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator == "]":
            return position + 1
        if separator != ",":
            raise _broken_json(path, json.JSONDecodeError("Expecting ',' or ']'", text, position))
        position = _skip_space(text, position + 1)


def _jsonl_records(path: Path) -> Iterator[Record | BadRecord]:
    """Read one object a line; a line that is broken does not spoil the next."""
    num_records = 0
    for number, (line, offset) in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        num_records += 1
        where = f"{path} line {number}"
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield BadRecord(
                where=where, reason="not UTF-8", detail=f"byte {offset + error.start} of the file"
            )
        except json.JSONDecodeError as error:
            yield BadRecord(
                where=f"{where} column {error.colno}", reason="broken JSON", detail=_because(error)
            )
        except RecursionError:
            yield BadRecord(where=where, reason="broken JSON", detail="nested too deeply")
        else:
            if isinstance(value, dict):
                yield Record(where=where, fields=value)
            else:
                yield BadRecord(where=where, reason="not an object", detail=_brief(value))
    if not num_records:
        raise UserError(f"{path} is empty.", remedy=f"Expected {_SUPPORTED}.")


def _csv_records(path: Path) -> Iterator[Record | BadRecord]:
    """Read a comma-separated file with a header; a row must have as many fields as the header."""
    csv.field_size_limit(sys.maxsize)  # the default refuses an answer of more than 128 KiB
    rows = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in rows:
            where, line = f"{path} line {line}", rows.line_num + 1
            if not row:
                continue
            if not header:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header) or "" in header:
                    raise UserError(
                        f"{where}: the header needs a name of its own for every column, "
                        f"not {', '.join(header)!r}."
                    )
            elif len(row) != len(header):
                yield BadRecord(
                    where=where,
                    reason="wrong number of fields",
                    detail=f"{len(row)}, header has {len(header)}",
                )
            else:
                yield Record(where=where, fields=dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num}: broken CSV: {error}.") from error


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield Record(where=f"{path} row {number}", fields=row)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


def _text_records(path: Path) -> Iterator[Record]:
    yield Record(where=f"{path} line 1", fields={"text": _read_text(path)})


def _hub_records(name: str) -> Iterator[Record]:
    for number, row in enumerate(_load_from_hub(name), start=1):
        yield Record(where=f"{name} row {number}", fields=row)


def _hub_fingerprint(name: str) -> str:
    digest = hashlib.sha256()
    for row in _load_from_hub(name):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _load_from_hub(name: str) -> Any:
    """Load the train split of a data set of the hub; `datasets` keeps it on disk after the first time."""
    path = Path(name)
    not_found = f"{name} does not exist"
    if path.suffix.lower() in _READERS or looks_like_path(name):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise UserError(not_found + ".", remedy=f"Did you mean {path.parent / near[0]}?" if near else None)

    import datasets

    is_online = hub_answers()
    if not is_online:
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's client raises its own, datasets', httpx' and OS errors
        why = f"has no such data set: {_first_line(error)}" if is_online else "cannot be reached."
        raise UserError(
            f"{not_found} here, and the hub {why}",
            remedy="Give the path of a file or folder, or check the name and the network.",
        ) from error


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}).",
            remedy=f"Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path} > converted{path.suffix}",
        ) from error
    return text


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines of a file with the offset at which each starts."""
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            yield line, offset
            offset += len(line)


def _decode(path: Path, text: str, position: int) -> tuple[Any, int]:
    """Decode the JSON value that starts at `position`; return it and where it ends."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _broken_json(path, error) from error
    except RecursionError as error:
        raise UserError(f"{path} line {_line(text, position)}: broken JSON: nested too deeply.") from error


def _broken_json(path: Path, error: json.JSONDecodeError) -> UserError:
    if error.pos >= len(error.doc.rstrip()):
        return UserError(
            f"{path} line {error.lineno}: broken JSON: the file ends in the middle of a record.",
            remedy="It was probably not copied or downloaded to its end.",
        )
    return UserError(f"{path} line {error.lineno} column {error.colno}: broken JSON: {_because(error)}.")


def _because(error: json.JSONDecodeError) -> str:
    return f"{error.msg[0].lower()}{error.msg[1:]}, found {error.doc[error.pos : error.pos + 20]!r}"


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")

#: Lists that make up one record: an object with just this key is a record, not a wrapper around records.
_RECORD_LISTS = frozenset({"messages", "conversations"})

_READERS: dict[str, Callable[[Path], Iterator[Record | BadRecord]]] = {
    ".json": _json_records,
    ".jsonl": _jsonl_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
    ".txt": _text_records,
}
_SUPPORTED = "a .json, .jsonl, .csv, .parquet or .txt file with at least one record"
