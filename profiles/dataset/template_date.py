"""Pin the date in chat templates that write today's, so that conversations have the same tokens on any day.

Templates get the date from `strftime_now(format)`, which transformers evaluates at rendering, in the local
time zone and the process's locale.  A study fixes one date (ISO 8601) when it is created, for its data and
for later generation.  The date is stored in the tokenizer's configuration, under `template_date`, and so is
part of every checkpoint and export.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError

#: The key in tokenizer_config.json.
KEY = "template_date"

_FUNCTION = "strftime_now"


def writes_date(jinja: str | dict[str, str] | None) -> bool:
    """Return whether a chat template uses today's date."""
    texts = jinja.values() if isinstance(jinja, dict) else (jinja or "",)
    return any(_FUNCTION in text for text in texts)


def files_write_date(files: Iterable[Path]) -> bool:
    """Return whether a chat template in one of a tokenizer's files uses today's date."""
    return any(
        _FUNCTION.encode() in path.read_bytes()
        for path in files
        if path.suffix in (".jinja", ".json") and path.name != "tokenizer.json"
    )


def date_in_files(files: Iterable[Path]) -> str | None:
    """Return the date in a tokenizer's files that the model was trained with, None without one."""
    for path in files:
        if path.name == "tokenizer_config.json":
            try:
                return _valid(json.loads(path.read_text(encoding="utf-8")).get(KEY))
            except (OSError, ValueError, AttributeError):
                return None
    return None


def recorded_date(tokenizer: Any) -> str | None:
    """Return the date that a loaded tokenizer's model was trained with, None without one."""
    return _valid(tokenizer.init_kwargs.get(KEY))


def record_date(tokenizer: Any, date: str) -> None:
    """Make `save_pretrained` store the date that was used in rendering."""
    tokenizer.init_kwargs[KEY] = date


def today() -> str:
    """Return the local date, in ISO 8601."""
    return datetime.date.today().isoformat()  # noqa: DTZ011 - as transformers' strftime_now


def parse_date(text: str) -> str:
    """Return a date in ISO 8601.  Raises UserError for anything else."""
    if (date := _valid(text)) is None:
        raise UserError(f"--template-date {text!r} is not a date.", remedy="Write it like 2026-11-30.")
    return date


def with_date(jinja: str, date: str | None) -> str:
    """Return a template that writes `date` where `jinja` would write today's; unchanged for None.

    Names of days and months are English whatever the locale; the time of day is midnight.
    """
    if date is None or not writes_date(jinja):
        return jinja
    steps = "".join(f"|replace({code!r},{text!r})" for code, text in _codes(date))
    # transformers trims the newline, so that the template still begins at the start of a line.
    return f"{{%- macro {_FUNCTION}(format) -%}}{{{{- format{steps} -}}}}{{%- endmacro %}}\n{jinja}"


def pin_date(tokenizer: Any, date: str | None) -> Any:
    """Make a tokenizer, which must not be saved afterwards, write `date` instead of today's; return it."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: with_date(jinja, date) for name, jinja in template.items()}
    elif template is not None:
        tokenizer.chat_template = with_date(template, date)
    return tokenizer


def _valid(text: object) -> str | None:
    try:
        return datetime.date.fromisoformat(str(text).strip()).isoformat()
    except ValueError:
        return None


def _codes(date: str) -> list[tuple[str, str]]:
    """Return strftime's codes with their values, in an order in which they can be replaced."""
    day = datetime.date.fromisoformat(date)
    name, month = _DAYS[day.weekday()], _MONTHS[day.month - 1]
    zero = {code: "00" for code in "HMS"}
    plain = {
        "a": name[:3],
        "A": name,
        "b": month[:3],
        "B": month,
        "h": month[:3],
        "c": f"{name[:3]} {month[:3]} {day.day:2} 00:00:00 {day.year}",
        "C": f"{day.year // 100:02}",
        "d": f"{day.day:02}",
        "D": f"{day.month:02}/{day.day:02}/{day.year % 100:02}",
        "e": f"{day.day:2}",
        "f": "000000",
        "F": day.isoformat(),
        "G": f"{day.isocalendar().year}",
        "I": "12",
        "j": f"{day.timetuple().tm_yday:03}",
        "m": f"{day.month:02}",
        "n": "\n",
        "p": "AM",
        "R": "00:00",
        "T": "00:00:00",
        "t": "\t",
        "u": f"{day.isoweekday()}",
        "U": day.strftime("%U"),
        "V": f"{day.isocalendar().week:02}",
        "w": f"{day.isoweekday() % 7}",
        "W": day.strftime("%W"),
        "x": f"{day.month:02}/{day.day:02}/{day.year % 100:02}",
        "X": "00:00:00",
        "y": f"{day.year % 100:02}",
        "Y": f"{day.year}",
        "z": "",
        "Z": "",
        **zero,
    }
    # glibc's and Windows' codes without a leading zero.
    bare = [
        (f"%{flag}{code}", text.strip().lstrip("0") or "0")
        for code, text in plain.items()
        if text.strip().isdigit()
        for flag in "-#"
    ]
    return [("%%", _PERCENT), *bare, *((f"%{code}", text) for code, text in plain.items()), (_PERCENT, "%")]


_PERCENT = "\x00"
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
