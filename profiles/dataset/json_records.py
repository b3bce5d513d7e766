"""Read records from JSON and JSON Lines, in the layouts that exporters and people write."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.columns import KEYS
from autosft.profiles.dataset.files import SUPPORTED, lines_of, read_text
from autosft.profiles.dataset.json_values import DECODER, python_dict
from autosft.profiles.dataset.problems import BadRecord, brief
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.split_names import split_of
from autosft.profiles.errors import UserError

Found = Iterator[Record | BadRecord]


def json_records(path: Path) -> Found:
    """Read a JSON file.

    Accepted are an array of records, one record, an object around an array of them, records by id, columns as
    pandas writes them, and JSON Lines with another suffix.  Raises `UserError` for broken JSON.
    """
    text = read_text(path)
    start = _skip_space(text, 0)
    if start == len(text):
        raise _empty(path)
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
        yield from jsonl_records(path)
    else:
        yield from _object_records(path, text, start, whole)


def jsonl_records(path: Path) -> Found:
    """Read one object per line, or objects that span several lines; a broken one does not affect the next.

    A file that is one array, or one object around records, is read as `json_records` does.
    """
    lines = enumerate(lines_of(path), start=1)
    ahead: deque[_Line] = deque()
    num_records = 0
    while (line := _next(lines, ahead)) is not None:
        num_records += 1
        if num_records == 1 and (records := _as_one_value(path, line)) is not None:
            yield from records
            return
        yield from _line_records(path, line, lines, ahead)
    if not num_records:
        raise _empty(path)


@dataclass(frozen=True, slots=True)
class _Line:
    number: int  # from 1
    content: bytes
    offset: int  # of its first byte in the file

    @property
    def indent(self) -> int:
        return len(self.content) - len(self.content.lstrip(b" \t"))


def _next(lines: Iterable[tuple[int, tuple[bytes, int]]], ahead: deque[_Line]) -> _Line | None:
    """Return the next non-blank line: one that was read ahead, else from the file."""
    while ahead:
        if (line := ahead.popleft()).content.strip():
            return line
    for number, (content, offset) in lines:
        if content.strip():
            return _Line(number, content, offset)
    return None


def _as_one_value(path: Path, first: _Line) -> Found | None:
    """Return the records of a file that is, by its first line, one array or one object around records."""
    start = first.content.lstrip()
    if not start.startswith((b"[", b"{")):
        return None
    if start.startswith(b"{"):
        try:
            value = DECODER.decode(start.decode("utf-8"))
        except (ValueError, RecursionError):
            pass
        else:
            if any(columns <= value.keys() for columns in KEYS):
                return None  # JSON Lines, as expected
    try:
        text = read_text(path)
        begin = _skip_space(text, 0)
        value, end = DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        # An array over several lines that is broken somewhere is one fault, not one for each line.
        return json_records(path) if start.rstrip() in (b"[", b"[{") else None
    if _skip_space(text, end) < len(text):
        return None
    if isinstance(value, list):
        # A complete list on one line is a line of JSON Lines, not a file of records.
        is_file = any(isinstance(each, dict) or _are_turns(each) for each in value) and not _are_turns(value)
        return _array_records(path, text, begin) if is_file else None
    return _object_records(path, text, begin, value)


def _line_records(
    path: Path, line: _Line, lines: Iterable[tuple[int, tuple[bytes, int]]], ahead: deque[_Line]
) -> Found:
    """Read the record that starts on a line; further lines that were read go to `ahead`."""
    where = f"{path} line {line.number}"
    try:
        text = line.content.decode("utf-8").rstrip().lstrip(_MARKS)
        values = _values_of(text)
    except UnicodeDecodeError as error:
        detail = f"byte {line.offset + error.start} of the file"
        yield BadRecord(where=where, reason="not UTF-8", detail=detail)
    except RecursionError:
        yield BadRecord(where=where, reason="broken JSON", detail="nested too deeply")
    except json.JSONDecodeError as error:
        value = None
        if text.lstrip().startswith("{") and error.pos >= len(text):
            value = _over_several_lines(line, lines, ahead)
        value = value or python_dict(text)
        if value is not None:
            yield Record(where=where, fields=value)
        else:
            where = f"{where} column {error.colno}"
            yield BadRecord(where=where, reason="broken JSON", detail=_because(error))
    else:
        for value in values:
            yield from _records(where, value)


def _values_of(text: str) -> list[Any]:
    """Decode the JSON values of a line: one, or several objects in a row."""
    values = []
    position = _skip_space(text, 0)
    while position < len(text):
        value, position = DECODER.raw_decode(text, position)
        values.append(value)
        position = _skip_space(text, position)
        if isinstance(value, dict) and text[position:] == ",":  # an array's lines without its brackets
            break
        if position < len(text) and not (isinstance(value, dict) and text[position] == "{"):
            raise json.JSONDecodeError("Extra data", text, position)
    return values


def _over_several_lines(
    first: _Line, lines: Iterable[tuple[int, tuple[bytes, int]]], ahead: deque[_Line]
) -> dict[str, Any] | None:
    """Decode an object that spans several lines; None, with the lines in `ahead`, if it does not end.

    It ends on a line with a closing brace that is not indented further than its first line.  A complete
    object on such a line means that the first one is broken.
    """
    taken = [first]
    while (line := _next(lines, ahead)) is not None:
        taken.append(line)
        if line.indent > first.indent:
            continue
        if line.content.lstrip().startswith(b"{") and _is_object(line.content):
            break
        if line.content.rstrip().endswith(b"}"):
            try:
                value = DECODER.decode(b"".join(part.content for part in taken).decode("utf-8"))
            except (ValueError, RecursionError):
                continue
            return value if isinstance(value, dict) else None
    ahead.extendleft(reversed(taken[1:]))
    return None


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(DECODER.decode(content.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _object_records(path: Path, text: str, start: int, whole: Mapping[str, Any]) -> Found:
    """Read the one object of a file: a record, or records within it."""
    where = f"{path} line {_line(text, start)}"
    if any(columns <= whole.keys() for columns in KEYS):
        rows = _rows_of_columns(whole)
        if rows is None:
            yield Record(where=where, fields=whole)
        for number, row in enumerate(rows or (), start=1):
            yield Record(where=f"{path} row {number}", fields=row)
        return
    if isinstance(whole.get("columns"), list) and isinstance(whole.get("data"), list):  # pandas' "split"
        for number, row in enumerate(whole["data"], start=1):
            is_row = isinstance(row, list) and len(row) == len(whole["columns"])
            fields = dict(zip(whole["columns"], row, strict=True)) if is_row else row
            yield from _records(f"{path} row {number}", fields)
        return
    splits = {name: split_of(name) for name in whole}
    if len(whole) > 1 and "train" in splits.values() and None not in splits.values():
        kept = [name for name, split in splits.items() if split == "train"]
        left_out = tuple(name for name in whole if name not in kept)
        yield from _within(path, text, start, kept, left_out)
        return
    lists = [name for name, value in whole.items() if _holds_records(value)]
    if len(lists) == 1:
        yield from _within(path, text, start, lists, ())
        return
    yield from _keyed_records(path, text, start, whole, where)


def _keyed_records(path: Path, text: str, start: int, whole: Mapping[str, Any], where: str) -> Found:
    """Read records that are the values of an object, each under its id."""
    values = list(whole.values())
    if len(values) == 1 and isinstance(values[0], dict) and values[0] and not _is_record(values[0]):
        ((_, value, position),) = _members(path, text, start)
        yield from _object_records(path, text, position, value)
    elif values and all(isinstance(value, dict) for value in values):
        for _, value, position in _members(path, text, start):
            yield Record(where=f"{path} line {_line(text, position)}", fields=value)
    elif values and all(_are_turns(value) for value in values):
        for _, value, position in _members(path, text, start):
            yield Record(where=f"{path} line {_line(text, position)}", fields={"messages": value})
    else:
        yield Record(where=where, fields=whole)


def _within(path: Path, text: str, start: int, names: list[str], left_out: tuple[str, ...]) -> Found:
    """Read the records in the members `names` of an object, and record that others are not read."""
    for name, value, position in _members(path, text, start):
        if name not in names:
            continue
        if isinstance(value, list):
            yield from _array_records(path, text, position, left_out)
        elif isinstance(value, dict):
            yield from _object_records(path, text, position, value)


def _rows_of_columns(whole: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Convert columns to rows: lists, or objects by row as `DataFrame.to_json` writes; None for a record."""
    values = list(whole.values())
    if all(isinstance(value, dict) for value in values) and len({tuple(value) for value in values}) == 1:
        return [{name: column[row] for name, column in whole.items()} for row in values[0]]
    if not all(isinstance(value, list) for value in values) or len({len(value) for value in values}) != 1:
        return None
    if any(_are_turns(whole[name]) for name in whole):
        return None
    return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]


def _is_record(fields: Mapping[str, Any]) -> bool:
    return any(columns <= fields.keys() for columns in KEYS)


def _are_turns(value: object) -> bool:
    return isinstance(value, list) and any(
        isinstance(turn, dict) and not turn.keys().isdisjoint(("role", "from")) for turn in value[:1]
    )


def _holds_records(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not _are_turns(value)


def _members(path: Path, text: str, start: int) -> Iterator[tuple[str, Any, int]]:
    """Yield name, value and position of the value for each member of the object that starts at `start`."""
    position = _skip_space(text, start + 1)
    while text[position] != "}":
        name, position = _decode(path, text, position)
        position = _skip_space(text, _skip_space(text, position) + 1)
        value, end = _decode(path, text, position)
        yield name, value, position
        position = _skip_space(text, end)
        if text[position] == ",":
            position = _skip_space(text, position + 1)


def _array_records(
    path: Path, text: str, start: int, left_out: tuple[str, ...] = ()
) -> Generator[Record | BadRecord, None, int]:
    """Read the array that starts at `start` record by record, counting lines; return where it ends."""
    position, counted, line = _skip_space(text, start + 1), 0, 1
    if text[position : position + 1] == "]":
        return position + 1
    while True:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _decode(path, text, position)
        yield from _records(f"{path} line {line}", value, left_out)
        position = _skip_space(text, position)
        separator = text[position : position + 1]
        if separator == "]":
            return position + 1
        if separator != ",":
            raise _broken_json(path, json.JSONDecodeError("Expecting ',' or ']'", text, position))
        position = _skip_space(text, position + 1)


def _records(where: str, value: Any, left_out: tuple[str, ...] = ()) -> Found:
    """Yield the records of one value: an object, a list of turns, or a list of records."""
    if isinstance(value, dict):
        yield Record(where=where, fields=value, splits_left_out=left_out)
    elif _are_turns(value):
        yield Record(where=where, fields={"messages": value}, splits_left_out=left_out)
    elif _holds_records(value) and all(isinstance(each, dict) for each in value):
        for each in value:
            yield Record(where=where, fields=each, splits_left_out=left_out)
    else:
        yield BadRecord(where=where, reason="not an object", detail=brief(repr(value), 40))


def _decode(path: Path, text: str, position: int) -> tuple[Any, int]:
    """Decode the JSON value that starts at `position`; return it and where it ends."""
    try:
        return DECODER.raw_decode(text, position)
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


def _empty(path: Path) -> UserError:
    return UserError(f"{path} is empty.", remedy=f"Expected {SUPPORTED}.")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


#: Byte order marks of files that were put together, and what begins a record of RFC 7464.
_MARKS = "\ufeff\x1e"
_SPACE = re.compile(r"[ \t\n\r]*")
