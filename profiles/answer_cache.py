"""Cache results that took a trace or a model's construction, on disk between processes.

The key consists of everything that determines a result, including installed versions and this package's own
code, so that a cached result equals a recomputed one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

FILE = "answers.sqlite"
#: The maximum number of results, of about 1.5 kB each; the oldest are dropped.  A plan needs about a hundred.
MAX_ANSWERS = 20_000
#: How long to wait for another process's write; a result that cannot be stored is computed again later.
TIMEOUT_S = 1.0
#: The packages whose code determines models and their steps.
DECIDING_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, slots=True)
class AnswerCache:
    """The cached results in a folder; caches nothing without a folder."""

    folder: Path | None

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return the result stored under `key`, None if there is none or it cannot be read."""
        if self.folder is None or not (self.folder / FILE).exists():
            return None
        row = None
        with _forgiving(self.folder), _opened(self.folder) as database:
            row = database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        with contextlib.suppress(ValidationError):
            return None if row is None else _adapter(kind).validate_json(row[0])
        return None

    def put(self, key: str, answer: object) -> None:
        """Store a result; ignores folders that cannot be written to."""
        if self.folder is None:
            return
        text = _adapter(type(answer)).dump_json(answer)
        with _forgiving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _opened(self.folder) as database:
                database.execute("INSERT OR REPLACE INTO answers (key, answer) VALUES (?, ?)", (key, text))
                database.execute(
                    "DELETE FROM answers WHERE rowid <= (SELECT max(rowid) FROM answers) - ?", (MAX_ANSWERS,)
                )


def key_of(*decisive: object) -> str:
    """Return the key of the result that the `decisive` values (their reprs) determine."""
    return hashlib.sha256(repr((_code_mark(), _versions(), *decisive)).encode()).hexdigest()


@contextlib.contextmanager
def _forgiving(folder: Path) -> Iterator[None]:
    """Continue without the cache if it cannot be used, and replace a corrupt one."""
    try:
        yield
    except (sqlite3.OperationalError, OSError):  # locked for too long, read-only, a full disk
        pass
    except sqlite3.DatabaseError:
        with contextlib.suppress(OSError):
            (folder / FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(folder / FILE, timeout=TIMEOUT_S)) as database, database:
        database.execute("PRAGMA synchronous = OFF")  # losing results in a power cut is acceptable
        database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer BLOB NOT NULL)")
        yield database


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


@functools.cache
def _versions() -> str:
    found = []
    for name in DECIDING_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name}=={importlib.metadata.version(name)}")
    return " ".join(found)


@functools.cache
def _code_mark() -> str:
    """Return the sha256 of this package's own sources."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".c", ".json"):
            digest.update(f"{path.relative_to(root)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()
