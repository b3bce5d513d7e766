"""Small JSON files about live processes, which keep them locked; a process's death unlocks its files.

The kernel releases the lock when the holder dies, however it dies, so that nothing has to be cleaned up after
a SIGKILL.  All access is inside the folder's critical section.  Locks are filelock's: flock on Linux and
macOS, LockFileEx on Windows (not tested there).
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

#: How often the lock of the critical section is tried; others hold it for a few file operations.
_POLL_S = 0.01
#: The bytes at the start of the file that Windows does not let others read while it is locked.
_NUM_LOCKED_BYTES = 1 if sys.platform == "win32" else 0
#: Longer files are not ours.
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
        """Lock the file and write its values."""
        locked = lock_descriptor(self._file, blocking=False)
        assert locked, f"a file that was just created is locked: {self.path}"
        self.write(values)

    def write(self, values: Mapping[str, object]) -> None:
        """Replace its values."""
        content = b" " * _NUM_LOCKED_BYTES + json.dumps(dict(values)).encode()
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, content)
        os.truncate(self._file, len(content))  # after the write: on a full disk the old bytes are reused

    def release(self) -> None:
        """Remove the file; calling it again has no effect."""
        if self._file >= 0:
            if sys.platform != "win32":  # Windows cannot remove an open file; the next reader does
                with contextlib.suppress(OSError):  # its disk is read-only now; unlocked, it counts no more
                    self.path.unlink(missing_ok=True)
            self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            _held_here.discard(self)


_held_here: set[LockedFile] = set()  # closed in forked children


def _forget_after_fork() -> None:
    for held in list(_held_here):
        held.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def live(folder: Path, suffix: str) -> list[dict[str, Any]]:
    """Return the values of live holders' files and remove the others; call inside the critical section.

    Values are empty for a held file that cannot be parsed, such as a later version's.
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
    """Lock a folder against other processes for a few file operations."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock_descriptor(file, poll_interval=_POLL_S)
        yield
    finally:
        os.close(file)
