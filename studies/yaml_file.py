"""YAML as people write it: scalars of YAML 1.2, and no duplicate keys.

PyYAML reads YAML 1.1, in which 1:30 is 90, 010 is 8, `no` is false, 2026-11-30 is a date and 1e-4 is text.
Here these are text or the decimal numbers that they look like (yaml.org/spec/1.2.2, 10.3.2, core schema).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from autosft.profiles.bounded_yaml import construct, read_bounded
from autosft.profiles.errors import UserError


def read_yaml(path: Path, *, text_keys: Collection[str] = ()) -> Any:
    """Return the contents of a YAML file; values of `text_keys` at the top level stay text.

    Raises UserError with the line for broken YAML and for a duplicate key.
    """
    try:
        loader = _Loader(read_bounded(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start}).",
            remedy=f"Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 {path} > converted{path.suffix}",
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{path}: {error.reason} at character {error.position}.") from error
    try:
        return construct(loader, change=partial(_keep_as_text, keys=text_keys))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem or 'broken YAML'}.") from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's core schema."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = key.value.replace("-", "_")  # as flags are read
                if name in seen and key.tag != _MERGE:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is given twice",
                        problem_mark=key.start_mark,
                    )
                seen.add(name)
        return super().construct_mapping(node, deep=deep)


def _keep_as_text(node: yaml.Node, keys: Collection[str]) -> None:
    """Turn numbers and booleans under `keys` of a mapping, or in a list under them, back into text."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value.replace("-", "_") not in keys:
            continue
        for scalar in value.value if isinstance(value, yaml.SequenceNode) else (value,):
            if isinstance(scalar, yaml.ScalarNode) and scalar.tag != _NULL:
                scalar.tag = _TEXT


def _integer(_: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = node.value.replace("_", "")
    base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
    return int(digits[2:] if base != 10 else digits, base)


def _number(_: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))


_TAG = "tag:yaml.org,2002:"
_NULL, _TEXT, _MERGE = f"{_TAG}null", f"{_TAG}str", f"{_TAG}merge"
_SCHEMA = (  # with the characters that such a scalar may begin with; "" stands for an empty scalar
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
)
_Loader.yaml_implicit_resolvers = {}  # replaces the base class's, which are YAML 1.1's
for _name, _pattern, _first in _SCHEMA:
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}int", _integer)
_Loader.add_constructor(f"{_TAG}float", _number)
