"""Parses the dimensions of a search space as users write them, in YAML or on the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from autosft.profiles.errors import UserError
from autosft.studies.search.dimensions import Choices, Dimension, Fixed, Range, Value
from autosft.studies.search.settings import Kind, Setting, find_setting


def parse_dimension(name: str, given: object) -> Dimension:
    """Parse a dimension.

    `3e-4` or `cosine` is a fixed value, `[16, 32, 64]` or "16, 32, 64" are choices, and "1e-5..1e-3 log" or
    "0..0.3 step 0.05" is a range.  (YAML reads 1e-5 as text; it is converted to a number.)

    Raises UserError with the value, what is permitted, and an example.
    """
    setting = find_setting(name)
    if isinstance(given, Range | Choices | Fixed):
        return given
    if isinstance(given, list | tuple):
        return _choices(setting, given)
    if isinstance(given, str) and ".." in given:
        return _range(setting, given)
    if isinstance(given, str) and "," in given and not setting.has_commas:
        _refuse_comma_in_number(setting, given)
        return _choices(setting, given.split(","))
    return Fixed(value=_value(setting, given))


def _refuse_comma_in_number(setting: Setting, text: str) -> None:
    """Raise UserError for a comma within a number ("2,048", "0,0003"), which would make two choices of it."""
    is_grouped = re.search(r",0\d", text) is not None
    is_decimal = not setting.is_whole and re.fullmatch(r"\s*0,\d+\s*", text) is not None
    if setting.kind is not Kind.TEXT and (is_grouped or is_decimal):
        plain = text.strip().replace(",", "." if is_decimal else "")
        choices = ", ".join(part.strip() for part in text.split(","))
        raise UserError(
            f"{setting.name}: {text.strip()!r} has a comma, which separates choices.",
            remedy=f'Write {plain}, or, for choices, "{choices}".',
        )


def _choices(setting: Setting, given: Sequence[object]) -> Dimension:
    values = tuple(dict.fromkeys(_value(setting, item) for item in given))
    if not values:
        raise UserError(f"{setting.name}: the list of choices is empty.", remedy="Give at least one value.")
    return Fixed(value=values[0]) if len(values) == 1 else Choices(values=values)


_RANGE = re.compile(r"(?P<low>[^\s.]\S*?)\s*\.\.\s*(?P<high>\S+)(?P<log>\s+log)?(?:\s+step\s+(?P<step>\S+))?")


def _range(setting: Setting, text: str) -> Dimension:
    example = f'Write it as "LOW..HIGH", optionally followed by " log" or " step SIZE": "{setting.example}".'
    match = _RANGE.fullmatch(text.strip())
    if match is None or setting.kind is Kind.TEXT or (match["log"] and match["step"]):
        what = "takes a list of choices, not a range" if setting.kind is Kind.TEXT else "is not a range"
        raise UserError(f"{setting.name}: {text!r} {what}.", remedy=example)
    low, high = (float(_value(setting, match[key])) for key in ("low", "high"))
    if low > high:
        raise UserError(f"{setting.name}: the range {text!r} ends below its start.", remedy=example)
    if low == high:
        return Fixed(value=_value(setting, match["low"]))
    step = _number(setting, match["step"]) if match["step"] else None
    if step is not None and not 0 < step <= high - low:
        raise UserError(
            f"{setting.name}: step {step:g} does not fit between {low:g} and {high:g}.", remedy=example
        )
    if step is not None and setting.is_whole and step != int(step):
        raise UserError(f"{setting.name}: step {step:g} has to be a whole number.", remedy=example)
    if match["log"] and low <= 0:
        raise UserError(f"{setting.name}: a log range has to start above 0, not at {low:g}.", remedy=example)
    if step is None and setting.is_whole and not match["log"]:
        step = 1.0
    return Range(low=low, high=high, log=bool(match["log"]), step=step)


def _number(setting: Setting, given: object) -> float:
    try:
        number = (
            float(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else None
        )
    except (ValueError, OverflowError):
        number = None
    if number is None or not math.isfinite(number):
        raise UserError(
            f"{setting.name}: {given!r} is not a number.", remedy=f'For example "{setting.example}".'
        )
    return number


def _value(setting: Setting, given: object) -> Value:
    """Check a single value and convert it to the setting's type."""
    if setting.kind is Kind.TEXT:
        return _text(setting, given)
    number = _number(setting, given)
    low, high = setting.low, setting.high
    if (low is not None and number < low) or (high is not None and number > high):
        ends = [f"at least {low:g}"] if low is not None else []
        ends += [f"at most {high:g}"] if high is not None else []
        bound = f"from {low:g} to {high:g}" if len(ends) == 2 else ends[0]
        raise UserError(f"{setting.name}: {number:g} is out of bounds; it has to be {bound}.")
    if not setting.is_whole:
        return number
    if number != int(number):
        raise UserError(f"{setting.name}: {number:g} has to be a whole number.")
    return int(number)


def _text(setting: Setting, given: object) -> str:
    if isinstance(given, list | tuple) and setting.has_commas:
        given = ",".join(str(item).strip() for item in given)
    text = given.strip() if isinstance(given, str) else ""
    if not text or (setting.known and text not in setting.known):
        allowed = (
            f"One of: {', '.join(setting.known)}." if setting.known else f"For example {setting.example}."
        )
        raise UserError(f"{setting.name}: {given!r} is not known.", remedy=allowed)
    if setting.check is not None:
        setting.check(text)
    return text
