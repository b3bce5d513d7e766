"""The folder of a run on this machine, and cleaning up after runs that died."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import lock_descriptor

from autosft.profiles.short_folder import private_folder
from autosft.scheduler.cluster import watchdog

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
        run_dir.mkdir(mode=0o700)
        lock = _lock(run_dir / watchdog.LOCK_NAME, wait=False)
    assert lock is not None, "no other process knows this folder yet"
    try:
        yield run_dir
    finally:
        lock.close()
        shutil.rmtree(run_dir, ignore_errors=True)


def clean_up_dead_runs() -> None:
    """Kill the processes and remove the folders of runs whose driver is dead; leave all others alone."""
    for run_dir in runs_root().iterdir():
        if not run_dir.is_dir():
            continue
        try:
            lock = _lock(run_dir / watchdog.LOCK_NAME, wait=False)
        except FileNotFoundError:  # its own driver has just removed it
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


def _lock(path: Path, *, wait: bool) -> IO[Any] | None:
    """Lock a file until it is closed or this process dies; return None if another process holds it."""
    file = path.open("a")
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
