"""The folder of a run on this machine, and cleaning up after runs that died."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from autosft.profiles.short_folder import private_folder
from autosft.scheduler.cluster import watchdog

_NEW = "new-"  # prefix of a folder that is being created
#: Entries below the folder of all runs: this run's, Ray's, its session's, and a socket with a suffix.
_ROOM_BYTES = len("/4ab31f02/ray/session_2026-11-30_08-44-10_123456_4194304/sockets/plasma_store") + 2


def runs_root() -> Path:
    """Return the folder of all of this user's runs.  Raises UserError if there is no usable folder."""
    return private_folder(f"autosft-{os.getuid()}", room_bytes=_ROOM_BYTES)


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """Create the folder of this run and hold its lock, which the kernel releases if the process dies."""
    root = runs_root()
    with _locked(root / "lock", wait=True):
        clean_up_dead_runs()
        run_dir = root / secrets.token_hex(4)
        new = root / f"{_NEW}{run_dir.name}"
        new.mkdir(mode=0o700)
        lock = _lock(new / watchdog.LOCK_NAME, wait=False)
        new.rename(run_dir)  # so that it has its lock from the beginning
    assert lock is not None, "no other process knows this folder yet"
    try:
        yield run_dir
    finally:
        lock.close()
        shutil.rmtree(run_dir, ignore_errors=True)


def clean_up_dead_runs() -> None:
    """Kill the processes and remove the folders of runs whose driver is dead; leave all else alone.

    Only what we have made is touched: a folder of this user, no link, by its name and with the lock that a
    run's folder has from its first moment on.
    """
    for run_dir in runs_root().iterdir():
        if re.fullmatch(rf"{_NEW}[0-9a-f]{{8}}", run_dir.name) and _is_ours(run_dir):
            with contextlib.suppress(OSError):  # a driver died before its folder had its name
                (run_dir / watchdog.LOCK_NAME).unlink(missing_ok=True)
                run_dir.rmdir()
            continue
        if not (re.fullmatch(r"[0-9a-f]{8}", run_dir.name) and _is_ours(run_dir)):
            continue
        try:
            lock = _lock(run_dir / watchdog.LOCK_NAME, wait=False, create=False)
        except OSError:  # no run's folder, or its own driver has just removed it
            continue
        if lock is not None:
            with lock:
                watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()}))


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    lock = _lock(path, wait=wait)
    assert lock is not None
    with lock:
        yield


def _is_ours(folder: Path) -> bool:
    """Whether a path is a folder of this user, and not a link to one."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _lock(path: Path, *, wait: bool, create: bool = True) -> IO[Any] | None:
    """Lock a file until it is closed or this process dies; return None if another process holds it.

    Does not follow links.  Raises OSError if the file does not exist and `create` is false.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    file = os.fdopen(os.open(path, flags, 0o600), "a")
    if lock_descriptor(file.fileno(), blocking=wait):
        return file
    file.close()
    return None


@contextlib.contextmanager
def guarded(run_dir: Path) -> Iterator[None]:
    """Run a process that cleans up if this one dies; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__, str(run_dir), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
