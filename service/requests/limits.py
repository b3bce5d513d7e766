"""What a request may name: files below folders that the admin has given, hub ids, and code where allowed.

A path is followed through its links before it is compared, and what is handed on is where it leads.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from autosft.profiles.errors import UserError

#: A model or data set of the hub: OWNER/NAME, or a name of old.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_WEIGHT = re.compile(r":\d+(\.\d+)?$")

#: Entries of a folder that are looked at for links that lead out of it.
MAX_ENTRIES = 20_000
MAX_LENGTH = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the admin allows."""

    folders: tuple[Path, ...]  # models and data are read below these, and below `outputs`
    outputs: Path  # what runs write is below this, in a folder for each user
    allow_hub: bool = True  # models and data by hub id
    allow_code: bool = False  # --loss, --trainer, --trust-remote-code, python: metrics, --notify

    def readable(self) -> tuple[Path, ...]:
        """Return the folders that may be read, with links followed."""
        return tuple(folder.resolve() for folder in (*self.folders, self.outputs))


def source(flag: str, value: str, limits: Limits) -> str:
    """Return where a model or data lies, as an absolute path without links, or its hub id.

    A relative path is looked for below each folder in turn.  Raises UserError for everything else.
    """
    _require_plain(flag, value)
    if _URL.match(value):
        raise UserError(
            f"{flag} {value}: this server reads no URLs.", remedy=f"Put it below {_named(limits.folders)}."
        )
    path = Path(value)
    if path.is_absolute():
        return str(_inside(flag, value, path, limits))
    if not value.startswith("~"):
        for folder in limits.folders:
            candidate = folder / path
            if candidate.exists():
                return str(_inside(flag, value, candidate, limits))
        if HUB_ID.fullmatch(value) and ".." not in value:
            if limits.allow_hub:
                return value
            raise UserError(
                f"{flag} {value}: not below {_named(limits.folders)}, and this server loads nothing from "
                "the hub.",
                remedy="Ask its admin to put it there.",
            )
    raise _outside(flag, value, limits)


def sources(flag: str, value: str, limits: Limits) -> str:
    """Return several sources, each with its weight: `a.jsonl:2,b.csv`."""
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{flag}: names no data.")
    found = []
    for part in parts:
        weight = _WEIGHT.search(part)
        name = part[: weight.start()] if weight else part
        found.append(source(flag, name, limits) + (weight.group() if weight else ""))
    return ",".join(found)


def output(flag: str, value: str, owner_folder: Path) -> str:
    """Return a folder to write below the owner's.  Raises UserError for one elsewhere."""
    _require_plain(flag, value)
    root = owner_folder.resolve()
    path = (root / value).resolve() if not _URL.match(value) else Path("/")
    if root not in path.parents:
        raise UserError(
            f"{flag} {value}: your runs write below {owner_folder}.",
            remedy="Give a name, for example my-model, or leave it out.",
        )
    return str(path)


def without_password(flag: str, value: str) -> str:
    """Return a value that holds no password.  Raises UserError: it would be stored and shown."""
    from autosft.profiles.masking import has_password

    if has_password(value):
        raise UserError(
            f"{flag}: a URL with a password would be stored with the request.",
            remedy="Remove it; the server reads credentials from its own environment.",
        )
    return value


def _inside(flag: str, given: str, path: Path, limits: Limits) -> Path:
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # not there, may not be entered, links in a circle
        real = path.resolve() if ".." not in path.parts else Path("/")
        if not _is_below(real, limits.readable()):
            raise _outside(flag, given, limits) from None
        raise UserError(
            f"{flag} {given}: there is nothing.", remedy="Check the path on the server."
        ) from None
    roots = limits.readable()
    if not _is_below(real, roots):
        raise _outside(flag, given, limits)
    if real.is_dir():
        _require_closed(flag, given, real, roots)
    return real


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(root == path or root in path.parents for root in roots)


def _require_closed(flag: str, given: str, folder: Path, roots: Sequence[Path]) -> None:
    """Raise UserError for a folder with a link, or an adapter's base, that leads out of what may be read."""
    for entry in itertools.islice(_entries(folder), MAX_ENTRIES):
        if entry.is_symlink() and not _is_below(Path(os.path.realpath(entry.path)), roots):
            raise UserError(
                f"{flag} {given}: {entry.name} in it is a link out of the folders that this server reads.",
                remedy="Put the file itself there.",
            )
    base = _base_of_adapter(folder)
    if base is not None and Path(base).is_absolute() and not _is_below(Path(base).resolve(), roots):
        raise UserError(
            f"{flag} {given}: the adapter's base model, {base}, is not below the folders that are read here.",
            remedy="Set base_model_name_or_path in its adapter_config.json to one that is.",
        )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            for entry in found:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    yield from _entries(Path(entry.path))
    except OSError:
        return


def _base_of_adapter(folder: Path) -> str | None:
    file = folder / "adapter_config.json"
    try:
        if file.stat().st_size > 1 << 20:
            return None
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) else None


def _require_plain(flag: str, value: str) -> None:
    if not value or len(value) > MAX_LENGTH or any(ord(letter) < 32 for letter in value):
        raise UserError(f"{flag}: {value[:80]!r} is not a path, nor a hub id.")


def _outside(flag: str, value: str, limits: Limits) -> UserError:
    return UserError(
        f"{flag} {value}: not below a folder that this server reads ({_named(limits.folders)}).",
        remedy="Put it there, or have the admin add its folder: autosft serve --folder FOLDER.",
    )


def _named(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders)) or "no folder was given to it"
