"""Open the sources of `--data`: files, folders and data sets of the hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.column_map import ColumnMap
from autosft.profiles.dataset.files import is_compressed, kind_of
from autosft.profiles.dataset.folders import files_of
from autosft.profiles.dataset.hub import hub_answers, looks_like_path
from autosft.profiles.dataset.problems import BadRecord, brief
from autosft.profiles.dataset.readers import records_of
from autosft.profiles.dataset.record import Record
from autosft.profiles.errors import UserError
from autosft.profiles.sources import full_path

#: A larger weight is taken for a mistake: the source's records would be memorised.
MAX_WEIGHT = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceName:
    """One source as given: PATH_OR_HUB_ID[:NAME][:WEIGHT]."""

    text: str  # as given
    path: str
    part: str | None = None  # a data set, a subfolder or a split within it
    weight: float = 1.0

    @property
    def here(self) -> Path:
        return Path(self.path).expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where records come from, and a fingerprint of their content."""

    name: str  # as the user gave it, without its weight
    files: tuple[Path, ...]  # empty for a data set of the hub
    validation: tuple[Path, ...] = ()  # files to evaluate on
    fingerprint: str  # sha256, hex
    weight: float = 1.0  # how often its records are used, relative to weight 1
    columns: ColumnMap | None = None
    part: str | None = None  # configuration of the hub's data set
    said: tuple[str, ...] = ()

    def records(self) -> Iterator[Record | BadRecord]:
        """Read all records in order.  Raises `UserError` where a file cannot be read further."""
        return self._records(self.files) if self.files else _hub_records(self.name, self.part)

    def validation_records(self) -> Iterator[Record | BadRecord]:
        """Read the records of the files to evaluate on, in the same way."""
        return self._records(self.validation)

    def _records(self, files: tuple[Path, ...]) -> Iterator[Record | BadRecord]:
        extra = frozenset(self.columns.columns.values()) if self.columns else frozenset()
        for path in files:
            for record in records_of(path, extra):
                is_mapped = self.columns is not None and isinstance(record, Record)
                yield self.columns.apply(record) if is_mapped else record  # type: ignore[union-attr, arg-type]


def open_sources(text: str, *, is_evaluated: bool = False) -> tuple[Source, ...]:
    """Open the sources in a comma-separated list.

    Raises `UserError` for a source that is neither a readable file or folder nor a data set on the hub.
    """
    return tuple(_open(name, is_evaluated) for name in source_names(text))


def open_source(text: str) -> Source:
    """Open a single source.  Raises `UserError` like `open_sources`."""
    (source,) = open_sources(text)
    return source


def source_names(text: str) -> tuple[SourceName, ...]:
    """Split the value of `--data` into its sources.

    Commas separate sources, `:NAME` chooses within a folder, and `:2` is a weight; but an existing path is
    taken as it is, whatever characters it contains.
    """
    parts = text.split(",")
    names: list[SourceName] = []
    start = 0
    while start < len(parts):
        for end in range(len(parts), start, -1):
            name = _source_name(",".join(parts[start:end]).strip())
            if name.here.exists() or end == start + 1:
                break
        if name.text:
            names.append(name)
        start = end
    if not names:
        raise UserError(f"{text!r} names no data.", remedy="Give the path of a file or folder, or a hub id.")
    return tuple(names)


def short_name(text: str) -> str:
    """Return a short name for the value of `--data`, without folders and suffixes, for study names."""
    paths = [Path(name.path) for name in source_names(text)]
    return "+".join((path.with_suffix("") if is_compressed(path) else path).stem for path in paths)


def in_full(text: str) -> str:
    """Return the value of `--data` with absolute paths, which mean the same from any folder."""
    return ",".join(
        full_path(name.path) + name.text[len(name.path) :] if name.here.exists() else name.text
        for name in source_names(text)
    )


def hub_names(text: str) -> list[str]:
    """Return the hub's data sets in the value of `--data`."""
    return [name.path for name in source_names(text) if not _is_path(name)]


def without_folders(text: str) -> str:
    """Return the value of `--data` without paths' folders, which would reveal details of a machine."""
    shown = []
    for name in source_names(text):
        shown.append(Path(name.path).name + name.text[len(name.path) :] if _is_path(name) else name.text)
    return ",".join(shown)


def _is_path(name: SourceName) -> bool:
    return name.here.exists() or looks_like_path(name.path) or kind_of(Path(name.path)) is not None


def files_fingerprint(files: tuple[Path, ...]) -> str:
    """Return the sha256 (hex) of the files' kinds and contents, in order, without their names."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            digest.update(path.suffix.lower().encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _source_name(text: str) -> SourceName:
    path, part, weight = text, None, 1.0
    if not Path(path).expanduser().exists() and (match := _WEIGHT.search(path)):
        path, weight = path[: match.start()], float(match["weight"])
        if not 0 < weight <= MAX_WEIGHT:
            raise UserError(
                f"{text}: a weight of {match['weight']} is not above 0 and at most {MAX_WEIGHT:g}.",
                remedy="2 uses a source's records twice as often, 0.5 half of them.",
            )
    if not Path(path).expanduser().exists() and (match := _PART.search(path)):
        path, part = path[: match.start()], match["part"]
    return SourceName(text=text, path=path, part=part, weight=weight)


def _open(name: SourceName, is_evaluated: bool) -> Source:
    shown = name.path if name.part is None else f"{name.path}:{name.part}"
    try:
        if not name.here.exists():
            fingerprint = _hub_fingerprint(name.path, name.part)
            return Source(
                name=name.path, files=(), fingerprint=fingerprint, weight=name.weight, part=name.part
            )
        files = files_of(name.here, name.part, is_evaluated=is_evaluated)
        fingerprint = files_fingerprint(files.train)
        if files.validation or files.columns:
            also = [files_fingerprint(files.validation), files.columns and files.columns.as_plain()]
            fingerprint = hashlib.sha256(json.dumps([fingerprint, also]).encode()).hexdigest()
        return Source(
            name=shown,
            files=files.train,
            validation=files.validation,
            fingerprint=fingerprint,
            weight=name.weight,
            columns=files.columns,
            said=files.said,
        )
    except OSError as error:
        raise UserError(f"{error.filename or name.path} cannot be read: {error.strerror}.") from error


def _hub_records(name: str, part: str | None) -> Iterator[Record]:
    for number, row in enumerate(_load_from_hub(name, part), start=1):
        yield Record(where=f"{name} row {number}", fields=row, fills_nulls=True)


def _hub_fingerprint(name: str, part: str | None) -> str:
    digest = hashlib.sha256()
    for row in _load_from_hub(name, part):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _load_from_hub(name: str, part: str | None) -> Any:
    """Load the train split of a data set of the hub; `datasets` caches it on disk."""
    _require_hub_name(name)
    not_found = f"{name} does not exist"

    import datasets

    is_online = hub_answers()
    if not is_online:
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return datasets.load_dataset(name, part, split="train")
    except Exception as error:  # the hub's client raises its own, datasets', httpx' and OS errors
        why = f"has no such data set: {_first_line(error)}" if is_online else "cannot be reached."
        raise UserError(
            f"{not_found} here, and the hub {why}",
            remedy="Give the path of a file or folder, or check the name and the network.",
        ) from error


def require_plausible(text: str) -> None:
    """Raise UserError for paths in the value of `--data` that do not exist; opens and asks nothing."""
    for name in source_names(text):
        if not name.here.exists():
            _require_hub_name(name.path)


def _require_hub_name(name: str) -> None:
    """Raise UserError, with the nearest file, for what does not exist and is no name of the hub."""
    path = Path(name)
    if kind_of(path) is not None or looks_like_path(name):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        remedy = f"Did you mean {path.parent / near[0]}?" if near else None
        raise UserError(f"{name} does not exist.", remedy=remedy)


def _first_line(error: Exception) -> str:
    lines = (line for line in str(error).splitlines() if line.strip())
    return brief(next(lines, type(error).__name__), 300)


_WEIGHT = re.compile(r":(?P<weight>[0-9]+(?:\.[0-9]+)?)$")
_PART = re.compile(r":(?P<part>[\w.-]+)$")
