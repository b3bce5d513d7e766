"""Strict conversion of frozen dataclasses to plain JSON values and back.

`to_plain` yields only what standard JSON (and YAML, and a database's JSON column) can hold: dict with
string keys, list, str, int, float, bool, None.  Enums become their values, tuples become lists, and the
floats that JSON lacks become `{"float": "nan" | "inf" | "-inf"}`.  A field that was renamed since a release
keeps its released name, given as its metadata `WIRE_NAME`.  `from_plain` follows the annotations: it
returns a value equal to the one that was written, and refuses anything else with the path of the field.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

T = TypeVar("T")

#: Key of a dataclass field's metadata: the field's name in plain values, where it is not its name in code.
WIRE_NAME = "wire_name"


class WireError(ValueError):
    """A plain value does not describe the requested type."""


def to_plain(value: object) -> Any:
    """Return `value` as plain JSON.

    Raises `TypeError` for anything but a dataclass instance, an enum member, a tuple or list, a mapping with
    string keys, or a plain scalar.
    """
    if isinstance(value, enum.Enum):  # first, since some enums are strings
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "as_mapping"):
            return {name: to_plain(item) for name, item in value.as_mapping().items()}
        return {wire: to_plain(getattr(value, name)) for wire, name in _names(type(value)).items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_plain(item) for key, item in value.items()}
    raise TypeError(f"{type(value).__name__} has no plain form")


def from_plain(cls: type[T], plain: object) -> T:
    """Return the `cls` that `plain` describes; the inverse of `to_plain`.

    Fields with a default may be missing (older writers); unknown fields are refused.  An int is accepted for
    a float; nothing else is converted.  Raises `WireError` that names the field.
    """
    return typing.cast(T, _decode(cls, plain, cls.__name__))


@functools.cache
def _names(cls: type) -> dict[str, str]:
    """Return the attribute name for each wire name of a dataclass, in the order of its fields."""
    return {field.metadata.get(WIRE_NAME, field.name): field.name for field in dataclasses.fields(cls)}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(expected: Any, plain: Any, where: str) -> Any:
    if isinstance(expected, type) and hasattr(expected, "from_mapping"):
        return _decode_mapped(expected, plain, where)
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return _decode_dataclass(expected, plain, where)
    origin = typing.get_origin(expected)
    if origin in (Union, types.UnionType):
        return _decode_union(typing.get_args(expected), plain, where)
    if origin is tuple:
        return _decode_tuple(typing.get_args(expected), plain, where)
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        try:
            return expected(plain)
        except ValueError:
            raise WireError(
                f"{where}: {plain!r} is none of {[member.value for member in expected]}"
            ) from None
    if expected is float:
        return _decode_float(plain, where)
    if expected is Any or expected is object:
        return plain
    if expected in (int, str, bool, type(None)) and type(plain) is expected:
        return plain
    raise WireError(f"{where}: {plain!r} is not {getattr(expected, '__name__', expected)}")


def _decode_dataclass(cls: type, plain: Any, where: str) -> Any:
    if not isinstance(plain, dict):
        raise WireError(f"{where}: {plain!r} is not a mapping of the fields of {cls.__name__}")
    names = _names(cls)
    if unknown := plain.keys() - names.keys():
        raise WireError(f"{where}: unknown field {sorted(map(str, unknown))[0]!r}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = [wire for wire, name in names.items() if name in required and wire not in plain]
    if missing:
        raise WireError(f"{where}: the field {missing[0]!r} is missing")
    hints = _hints(cls)
    values = {
        names[wire]: _decode(hints[names[wire]], value, f"{where}.{wire}") for wire, value in plain.items()
    }
    return cls(**values)


def _decode_mapped(cls: Any, plain: Any, where: str) -> Any:
    """Decode a class that is written as a mapping of names to values of type `cls.MAPPED`."""
    if not isinstance(plain, dict):
        raise WireError(f"{where}: {plain!r} is not a mapping")
    values = {name: _decode(cls.MAPPED, value, f"{where}.{name}") for name, value in plain.items()}
    try:
        return cls.from_mapping(values)
    except ValueError as error:
        raise WireError(f"{where}: {error}") from None


def _decode_union(alternatives: tuple[Any, ...], plain: Any, where: str) -> Any:
    # An exact match of a scalar type wins, so that 3 stays an int in `float | int` in any order.
    for alternative in alternatives:
        if isinstance(alternative, type) and type(plain) is alternative:
            return plain
    for alternative in alternatives:
        try:
            return _decode(alternative, plain, where)
        except WireError:
            continue
    raise WireError(f"{where}: {plain!r} is none of {[getattr(a, '__name__', str(a)) for a in alternatives]}")


def _decode_tuple(items: tuple[Any, ...], plain: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(plain, list | tuple):
        raise WireError(f"{where}: {plain!r} is not a list")
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_decode(items[0], item, f"{where}[{i}]") for i, item in enumerate(plain))
    if len(items) != len(plain):
        raise WireError(f"{where}: {len(plain)} items where {len(items)} belong")
    pairs = zip(items, plain, strict=True)
    return tuple(_decode(item_type, item, f"{where}[{i}]") for i, (item_type, item) in enumerate(pairs))


def _decode_float(plain: Any, where: str) -> float:
    if isinstance(plain, dict) and plain.keys() == {"float"} and plain["float"] in ("nan", "inf", "-inf"):
        return float(plain["float"])
    if isinstance(plain, int | float) and not isinstance(plain, bool):
        return float(plain)
    raise WireError(f"{where}: {plain!r} is not a number")
