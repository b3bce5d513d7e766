"""Folders whose paths are short enough for the Unix sockets below them.

The kernel takes 107 bytes for a socket's path (103 on macOS), and Ray's own take some 80 below its folder.
Temporary folders of batch systems are often longer than what is left ("/scratch/local/job.1234567").
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path

from autosft.profiles.errors import UserError

MAX_SOCKET_BYTES = 107 if sys.platform == "linux" else 103


def private_folder(name: str, *, room_bytes: int) -> Path:
    """Make the folder `name`, of this user alone, where sockets may lie `room_bytes` below it; return it.

    Always the same one for the same environment.  Raises UserError where there can be none, and where the
    name is another user's or a link.
    """
    return _private(short_base(room_bytes=len(f"/{name}") + room_bytes) / name)


def short_base(*, room_bytes: int) -> Path:
    """Return the temporary folder, or the first of the system's own that is short enough where it is not.

    `room_bytes` is what the longest path of a socket has below it.  Raises UserError where there is none.
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
    with contextlib.suppress(FileExistsError):  # also a file, or a link to nothing
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{folder} is not a folder, or is a link.", remedy="Remove it, or set TMPDIR.")
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user.", remedy="Set TMPDIR to a folder that you own.")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder


_SYSTEM = ("/tmp", "/var/tmp", "/dev/shm")  # nosec B108 - what is made there is checked by lstat
