"""Folders for unfinished files inside an output folder, which no end of a process leaves there for good.

Each has a lock that its process holds: a later export removes those of processes that are gone, and only
folders with our name, our lock and our user.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

#: How the names of such folders begin: what they are for.
PREFIXES = (".merged-", ".merging-", ".converting-")
LOCK = ".autosft-export.lock"


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Give an empty folder inside `parent`, on the same disk, which is removed afterwards."""
    assert prefix in PREFIXES
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    lock = FileLock(folder / LOCK)
    lock.acquire(timeout=0)
    try:
        (folder / "inside").mkdir()
        yield folder / "inside"
    finally:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the scratch folders in `parent` whose process is gone."""
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        if not folder.name.startswith(PREFIXES) or not _is_ours(folder):
            continue
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue  # in use
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder of this user, no link, with the lock that `scratch_folder` makes."""
    with contextlib.suppress(OSError):
        found, lock = folder.lstat(), (folder / LOCK).lstat()
        user = os.getuid() if hasattr(os, "getuid") else found.st_uid
        return stat.S_ISDIR(found.st_mode) and stat.S_ISREG(lock.st_mode) and found.st_uid == user
    return False


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Leave the block by KeyboardInterrupt at SIGTERM too, so that what it has made is removed.

    In the main thread only; elsewhere, and for a signal that is handled or ignored already, nothing changes.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def leave(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the removal
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
