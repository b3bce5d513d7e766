"""Decode JSON values as programs write them, and Python's notation of lists and dicts."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LongInteger:
    """An integer of more digits than Python converts (sys.set_int_max_str_digits)."""

    digits: str

    def __repr__(self) -> str:
        return f"an integer of {len(self.digits.lstrip('-')):,} digits"


def python_dict(text: str) -> dict[str, Any] | None:
    """Return the dict that a line holds as Python writes it (`print(record)`); None for other text."""
    value = parsed(text)
    return value if isinstance(value, dict) else None


def parsed(value: Any) -> Any:
    """Return the value, parsed if it is JSON in a string, as in CSV and in the tools column.

    Python's notation of lists and dicts is read too: pandas writes it into CSV files.
    """
    if not (isinstance(value, str) and value.lstrip()[:1] in ("[", "{")):
        return value
    try:
        return DECODER.decode(value)
    except (json.JSONDecodeError, RecursionError):
        pass
    if _PYTHON_LITERAL.match(value):
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    return value


def _integer(digits: str) -> int | LongInteger:
    return int(digits) if len(digits) <= _MAX_DIGITS else LongInteger(digits)


def _constant(name: str) -> float | None:
    """Return None for NaN, which pandas writes for missing values; JSON itself has no such constants."""
    return None if name == "NaN" else float(name)


_MAX_DIGITS = 4000  # Python's own limit is 4,300 by default
#: Tabs and line breaks within strings are read, too: not every program escapes them.
DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=_constant, strict=False)
_PYTHON_LITERAL = re.compile(r"\s*(\[\s*)?\{\s*['\"]")
