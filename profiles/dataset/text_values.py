"""Read text and lists from the values of a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from autosft.profiles.dataset.json_values import parsed
from autosft.profiles.dataset.problems import BadRecordError, brief

RESULT_AS_JSON = "results of tools are objects: they are written as JSON"


def text_of(value: object) -> str:
    """Return a text value; a whole number is its digits.

    Raises `BadRecordError` for other values and for invalid Unicode.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bytes):  # Parquet written without marking text as such
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRecordError("not valid Unicode", "bytes that are not UTF-8") from None
    if not isinstance(value, str):
        raise BadRecordError("content that is not text", brief(repr(value)))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecordError(
                "not valid Unicode", f"half of a surrogate pair: {error.object[error.start]!r}"
            ) from None
    return value


def text_of_parts(content: object, *, is_result: bool, found: set[str]) -> str:
    """Return a message's content: text, OpenAI's list of parts, or JSON as a tool's result."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and _is_part(part) for part in content):
        for part in content:
            if part.get("type", "text") not in _TEXT_PARTS:
                raise BadRecordError("content that is not text", f"a part of type {part['type']!r}")
        return "".join(text_of(part.get("text")) for part in content)
    if is_result and not isinstance(content, str | bytes):
        found.add(RESULT_AS_JSON)
        return as_json(content, "a tool's result")
    return text_of(content)


def _is_part(part: Mapping[str, Any]) -> bool:
    return "type" in part or part.keys() == {"text"}


#: Types of parts that hold text: OpenAI's, and those of its Responses API.
_TEXT_PARTS = ("text", "input_text", "output_text")


def as_json(value: object, what: str) -> str:
    """Write a value as JSON.  Raises `BadRecordError` for one that JSON cannot represent."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BadRecordError(f"{what} is not JSON", brief(str(error), 100)) from None


def list_in(value: Any, name: str) -> list[Any]:
    """Return a list, given as such or as JSON.  Raises `BadRecordError`."""
    found = parsed(value)
    if not isinstance(found, list):
        raise BadRecordError(f"{name} is not a list", brief(repr(value)))
    return found
