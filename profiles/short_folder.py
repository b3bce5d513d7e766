"""Temporary folders whose paths are short enough for Unix sockets in them.

A socket's path has at most 107 bytes (103 on macOS), of which Ray's need about 80 below its folder.
Temporary folders of batch systems are often longer than what remains ("/scratch/local/job.1234567").
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

from autosft.profiles.errors import UserError

MAX_SOCKET_BYTES = 107 if sys.platform == "linux" else 103


def private_folder(name: str, *, room_bytes: int) -> Path:
    """Make and return a folder `name`, private to this user, with room for socket paths of `room_bytes`.

    The same environment always gives the same folder.  Raises UserError where no folder is possible, and
    where it belongs to another user or is a link.
    """
    return _private(short_base(room_bytes=len(f"/{name}") + room_bytes) / name)


def short_base(*, room_bytes: int) -> Path:
    """Return the temporary folder, or if its path is too long the first of the system's that is short enough.

    `room_bytes` is the length of the longest socket path below it.  Raises UserError where there is none.
    """
    bases = [Path(tempfile.gettempdir()), *map(Path, _SYSTEM)]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        bases.append(Path(runtime))
    for base in bases:
        if len(os.fsencode(base)) + room_bytes <= MAX_SOCKET_BYTES and _is_writable(base):
            return base
    raise UserError(
        f"no temporary folder can hold Unix sockets, whose paths have at most {MAX_SOCKET_BYTES} bytes, "
        f"{room_bytes} of them below it: {', '.join(map(str, bases))}.",
        remedy="Set TMPDIR to a short path that can be written to, such as /tmp.",
    )


def _is_writable(base: Path) -> bool:
    return base.is_dir() and os.access(base, os.W_OK | os.X_OK)


def _private(folder: Path) -> Path:
    """Make a folder with mode 0700; an existing one must be private to this user."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{folder} is not a folder, or is a link.", remedy="Remove it, or set TMPDIR.")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user.", remedy="Set TMPDIR to a folder that you own.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


_SYSTEM = ("/tmp", "/var/tmp", "/dev/shm")
