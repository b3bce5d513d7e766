"""Durations and sizes as users write them."""

from __future__ import annotations

import re

import pydantic
from pydantic import ByteSize, TypeAdapter

from autosft.profiles.errors import UserError

_DURATION = re.compile(r"(?:(?P<d>[\d.]+)d)?(?:(?P<h>[\d.]+)h)?(?:(?P<m>[\d.]+)m)?(?:(?P<s>[\d.]+)s?)?")
_CLOCK = re.compile(r"(?P<h>\d+):(?P<m>[0-5]\d)(?::(?P<s>[0-5]\d))?")
_UNITS_S = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str | float) -> float:
    """Parse "3h", "1h30m", "1:30" (h:mm), "90s" or a number of seconds; return seconds.  Raises UserError."""
    given = str(text).strip().lower().replace(" ", "")
    if clock := _CLOCK.fullmatch(given):
        given = f"{clock['h']}h{clock['m']}m{clock['s'] or 0}s"
    match = _DURATION.fullmatch(given)
    try:
        parts = {} if match is None else {u: float(v) for u, v in match.groupdict().items() if v}
    except ValueError:
        parts = {}
    seconds = sum(value * _UNITS_S[unit] for unit, value in parts.items())
    if not parts or seconds <= 0:
        raise UserError(
            f"{text!r} is not a positive duration.", remedy="Write it like 3h, 45m, 1h30m, 1:30 or 90s."
        )
    return seconds


_SIZE = re.compile(r"\s*\d*\.?\d+\s*[a-z]*\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Parse "20GB", "1.5 TiB", "500M" or a plain number of bytes; return bytes.  Raises UserError."""
    try:
        # ByteSize parses as much as it understands: without the pattern "1,000MB" would be one byte.
        num_bytes = TypeAdapter(ByteSize).validate_python(text) if _SIZE.fullmatch(text) else 0
    except pydantic.ValidationError:
        num_bytes = 0
    if num_bytes <= 0:
        raise UserError(f"{text!r} is not a positive size.", remedy="Write it like 20GB or 500MiB.")
    return int(num_bytes)
