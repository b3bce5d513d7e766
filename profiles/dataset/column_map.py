"""Map other names of columns and roles, as LLaMA-Factory's dataset_info.json declares them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.json_values import parsed
from autosft.profiles.dataset.problems import brief, brief_list
from autosft.profiles.dataset.record import Record
from autosft.profiles.errors import UserError

REGISTRY = "dataset_info.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnMap:
    """The names of a data set's columns and roles, by autosft's names for them."""

    columns: Mapping[str, str]  # {"instruction": "question"}
    role_key: str = ""  # of a turn
    content_key: str = ""
    roles: Mapping[str, str] = field(default_factory=dict)  # {"USER": "user"}

    def apply(self, record: Record) -> Record:
        """Return the record under autosft's names; other columns are unchanged."""
        fields = {name: value for name, value in record.fields.items() if name not in self.columns.values()}
        fields |= {ours: record.fields[name] for ours, name in self.columns.items() if name in record.fields}
        turns = parsed(fields.get("messages"))
        if self.role_key and isinstance(turns, list):
            fields["messages"] = [self._turn(parsed(turn)) for turn in turns]
        return replace(record, fields=fields)

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        rest = {key: value for key, value in turn.items() if key not in (self.role_key, self.content_key)}
        role = turn.get(self.role_key)
        role = self.roles.get(role, role) if isinstance(role, str) else role
        return {**rest, "role": role, "content": turn.get(self.content_key)}

    def as_plain(self) -> list[Any]:
        """Return the mapping as plain values, for fingerprints."""
        return [dict(self.columns), self.role_key, self.content_key, dict(self.roles)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryEntry:
    """One data set of a LLaMA-Factory folder."""

    name: str
    path: Path  # file or folder
    columns: ColumnMap


def is_registry(folder: Path) -> bool:
    """Return whether a folder has a dataset_info.json of LLaMA-Factory, not one that `datasets` writes."""
    entries = _entries(folder / REGISTRY)
    return bool(entries) and all(
        isinstance(entry, Mapping) and not _SOURCES.isdisjoint(entry) for entry in entries.values()
    )


def registry_entry(folder: Path, name: str | None) -> RegistryEntry:
    """Return the named entry of LLaMA-Factory's dataset_info.json, or without a name the only one with files.

    Raises `UserError` if the name is unknown or ambiguous, and for entries that SFT cannot use.
    """
    entries = _entries(folder / REGISTRY)
    local = [listed for listed, entry in entries.items() if _path(folder, listed, entry).exists()]
    where = folder / REGISTRY
    if name is None:
        if len(local) != 1:
            of = f"{len(local)} data sets that are here" if local else "no data set whose file is here"
            example = local[0] if local else next(iter(entries))
            raise UserError(
                f"{where} lists {of}: {brief_list(local or entries)}.",
                remedy=f"Name one: {folder}:{example}",
            )
        name = local[0]
    elif name not in entries:
        raise UserError(f"{where} has no data set {name!r}.", remedy=f"It has {brief_list(entries)}.")
    entry = entries[name]
    for key in ("ranking", "num_samples"):
        if entry.get(key):
            why = "is for preference training" if key == "ranking" else "is not followed"
            raise UserError(f"{where}, {name}: {key} {why}.", remedy=f"Remove {key} or give the file itself.")
    path = _path(folder, name, entry)
    if not path.exists():
        raise UserError(f"{where}, {name}: {path} does not exist.")
    return RegistryEntry(name=name, path=path, columns=_column_map(entry, f"{where}, {name}"))


def _entries(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _path(folder: Path, name: str, entry: Mapping[str, Any]) -> Path:
    return folder / str(entry.get("file_name") or f"{name}.no-local-file")


def _column_map(entry: Mapping[str, Any], where: str) -> ColumnMap:
    """Read columns and tags with LLaMA-Factory's defaults (its data/parser.py, DatasetAttr)."""
    formatting = entry.get("formatting") or "alpaca"
    if formatting not in _TAGS and formatting != "alpaca":
        raise UserError(f"{where}: formatting {brief(repr(formatting))} is not alpaca, sharegpt or openai.")
    given = {name: str(value) for name, value in (entry.get("columns") or {}).items() if value}
    names = {**_ALPACA, **_BESIDE} if formatting == "alpaca" else {"messages": "messages", **_BESIDE}
    unknown = [name for name in given if name not in names and name not in _IGNORED]
    if unknown:
        raise UserError(f"{where}: columns {brief_list(unknown)} cannot be read.")
    defaults = {} if formatting == "alpaca" else {"messages": "conversations"}
    columns = {names[name]: value for name, value in {**defaults, **given}.items() if name in names}
    if formatting == "alpaca":
        return ColumnMap(columns=columns)
    tags = {**_TAGS[formatting], **(entry.get("tags") or {})}
    return ColumnMap(
        columns=columns,
        role_key=str(tags["role_tag"]),
        content_key=str(tags["content_tag"]),
        roles={str(tags[tag]): role for tag, role in _ROLES.items()},
    )


_SOURCES = frozenset({"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"})
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
_BESIDE = {name: name for name in ("system", "tools", "chosen", "rejected", "kto_tag")}
_IGNORED = frozenset({*_ALPACA, "messages"})  # of the other formatting
_SHAREGPT = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_TAGS = {
    "sharegpt": _SHAREGPT,
    "openai": {
        **_SHAREGPT,
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
    },
}
_ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
