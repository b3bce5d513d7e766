"""Small files of JSON that say something of a live process: it keeps them locked, and its death unlocks them.

The kernel lets go of the lock when the holder dies, however it dies, so that nothing has to be cleaned up
after a SIGKILL.  All of it happens inside the folder's critical section.  filelock locks: flock on Linux and
macOS, LockFileEx on Windows (the latter not tested).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

#: How often the critical section is asked for; others are in it for some file operations.
_POLL_S = 0.01
#: What Windows keeps others from reading while it is locked.
_NUM_LOCKED_BYTES = 1 if sys.platform == "win32" else 0
#: A file that is longer is none of ours.
_MAX_BYTES = 1 << 16


class LockedFile:
    """A file that this process holds until `release` or its death.

    A forked child does not hold it: the child's copy is closed at once, or it would outlive the holder.
    """

    def __init__(self, folder: Path, suffix: str) -> None:
        self.path = folder / f"{uuid.uuid4().hex}{suffix}"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _held_here.add(self)

    @property
    def is_held(self) -> bool:
        return self._file >= 0

    def publish(self, values: Mapping[str, object]) -> None:
        """Lock the file and show what it says."""
        locked = lock_descriptor(self._file, blocking=False)
        assert locked, f"a file that was only now created is locked: {self.path}"
        self.write(values)

    def write(self, values: Mapping[str, object]) -> None:
        """Replace what it says."""
        content = b" " * _NUM_LOCKED_BYTES + json.dumps(dict(values)).encode()
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, content)
        os.truncate(self._file, len(content))  # after the write: on a full disk the old bytes are reused

    def release(self) -> None:
        """Remove the file; harmless when repeated."""
        if self._file >= 0:
            if sys.platform != "win32":  # which cannot remove an open file; the next reader does
                self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            _held_here.discard(self)


_held_here: set[LockedFile] = set()  # for the child of a fork


def _forget_after_fork() -> None:
    for held in list(_held_here):
        held.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def live(folder: Path, suffix: str) -> list[dict[str, Any]]:
    """Return what the files of live holders say and remove the others; inside the critical section.

    Empty for a file that is held and cannot be read, such as a later version's.
    """
    said: list[dict[str, Any]] = []
    for path in folder.glob(f"*{suffix}"):
        try:
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue  # released since the listing
        try:
            holder_is_dead = lock_descriptor(file, blocking=False)
            if not holder_is_dead:
                os.lseek(file, _NUM_LOCKED_BYTES, os.SEEK_SET)
                said.append(_parsed(os.read(file, _MAX_BYTES)))
        finally:
            os.close(file)
        if holder_is_dead:
            path.unlink(missing_ok=True)
    return said


def _parsed(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(content)
        if isinstance(values, dict):
            return values
    return {}


@contextlib.contextmanager
def critical_section(folder: Path) -> Iterator[None]:
    """Be the only process that changes a folder's files, for some file operations."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock_descriptor(file, poll_interval=_POLL_S)
        yield
    finally:
        os.close(file)
