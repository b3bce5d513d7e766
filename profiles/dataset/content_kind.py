"""Recognise what a data file is by its first bytes, where its suffix says something else or nothing.

Windows hides suffixes (`chats.jsonl.txt`), Excel saves tables as .txt, and downloads leave error pages and
git lfs' pointers under the name of the data: read by its suffix, such a file would be learned as plain text,
or refused for a reason that is not the true one.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

from autosft.profiles.dataset.columns import KEYS
from autosft.profiles.dataset.files import SUPPORTED, decode_head, head_of, kind_of
from autosft.profiles.errors import UserError


def recognised_kind(path: Path) -> str | None:
    """Return the kind by which a file is read: its suffix's, unless its content is clearly of another.

    None if neither says.  Raises `UserError` for what is no data at all.
    """
    kind = kind_of(path)
    head = head_of(path)
    for mark, columnar in _MAGIC.items():
        if head.startswith(mark):
            return columnar
    if head.startswith(_LFS_POINTER):
        raise UserError(
            f"{path} is a pointer of git lfs, not the data itself.", remedy="Fetch the data: git lfs pull"
        )
    text = decode_head(head)
    if text is None:
        return kind
    if kind != ".txt" and _WEB_PAGE.match(text):
        raise UserError(
            f"{path} is a web page, not data.",
            remedy="The download probably failed or asked to log in: open the file in a browser.",
        )
    if kind not in (".json", ".jsonl") and (found := _json_kind(text)) is not None:
        return found
    return (_table_kind(text) or kind) if kind in (None, ".txt", ".json", ".jsonl") else kind


def require_readable(path: Path) -> None:
    """Raise UserError for a file that is of no kind that can be read, with what to do about it."""
    if recognised_kind(path) is None:
        kind = f"'{path.suffix}' is not a kind of file that can be read" if path.suffix else "has no suffix"
        remedy = _REMEDIES.get(path.suffix.lower(), "")
        raise UserError(f"{path}: {kind}.", remedy=f"{remedy}Expected {SUPPORTED}.")


def note_on(path: Path) -> str | None:
    """Return a remark if a file is read otherwise than its suffix says."""
    kind = recognised_kind(path)
    return None if kind in (None, kind_of(path)) else f"read as {_LABELS[kind]}, which it holds"


def _json_kind(text: str) -> str | None:
    """Return how the JSON records are laid out with which a text begins; None for other text."""
    start = text.lstrip()
    is_array = start.startswith("[")
    start = start[1:].lstrip() if is_array else start
    if not start.startswith("{"):
        return None
    try:
        record, _ = json.JSONDecoder(strict=False).raw_decode(start)
    except (ValueError, RecursionError):
        return None
    if not any(columns <= record.keys() for columns in KEYS):
        return None
    return ".json" if is_array else ".jsonl"


def _table_kind(text: str) -> str | None:
    """Return the kind of table of which a text's first line is the header, None for other text.

    A line of prose may begin like one ("Text, pictures and sound"), so that every name has to be one word and
    the next line has to have as many fields.
    """
    for delimiter, kind in (("\t", ".tsv"), (",", ".csv"), (";", ".csv")):
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            names, first = next(rows, []), next(rows, [])
        except csv.Error:
            continue
        columns = {name.strip().lower() for name in names}
        is_header = len(names) > 1 and len(first) == len(names) and all(map(_WORD.fullmatch, columns))
        if is_header and any(known <= columns for known in KEYS):
            return kind
    return None


_MAGIC: Mapping[bytes, str] = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_LFS_POINTER = b"version https://git-lfs"
_WORD = re.compile(r"[\w.-]*")
_WEB_PAGE = re.compile(r"\s*<(!doctype html|html)\b", re.IGNORECASE)
_LABELS = {
    ".json": "JSON",
    ".jsonl": "JSON Lines",
    ".csv": "a table of comma-separated values",
    ".tsv": "a table of tab-separated values",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
_REMEDIES = {
    ".zip": "Unpack it first. ",
    ".7z": "Unpack it first. ",
    ".rar": "Unpack it first. ",
    ".tar": "Unpack it first. ",
    ".tgz": "Unpack it first. ",
    ".xlsx": "Save the sheet as CSV. ",
    ".xls": "Save the sheet as CSV. ",
    ".ods": "Save the sheet as CSV. ",
    ".numbers": "Save the sheet as CSV. ",
    ".pkl": "Write it with DataFrame.to_parquet or as JSON Lines. ",
    ".pickle": "Write it with DataFrame.to_parquet or as JSON Lines. ",
}
