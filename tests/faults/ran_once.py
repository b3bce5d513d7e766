"""Which processes really ran an item, as they themselves say: at most one at a time, and one for each start.

The kernel is the witness of "at a time": a lock of a file, which a process has until it dies and a fork
of it has not.
"""

from __future__ import annotations

import collections
import fcntl
import json
import os
from pathlib import Path

from autosft.service.drivers import launch

LOCK, RAN, DOUBLED = "one_process", "ran.jsonl", "doubled.jsonl"
_held: list[int] = []


def note(folder: Path) -> None:
    """Record that this process runs the item whose outputs are in `folder`, and whether another one does."""
    held = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    about = {"pid": os.getpid(), "launch": os.environ.get(launch.LAUNCH, "")}
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        write(folder / DOUBLED, about)
    _held.append(held)  # closing it would let go of the lock
    write(folder / RAN, about)


def write(path: Path, about: dict[str, int | str]) -> None:
    line = (json.dumps(about) + "\n").encode()
    to = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(to, line)
    os.close(to)


def read(path: Path) -> list[dict[str, int | str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check(folder: Path) -> int:
    """Return how many processes have run; assert that no two did at once, nor two of one start."""
    assert not read(folder / DOUBLED), f"two processes at once: {read(folder / DOUBLED)}"
    ran = read(folder / RAN)
    starts = collections.Counter(about["launch"] for about in ran)
    assert all(times == 1 for times in starts.values()), f"two processes of one start: {ran}"
    return len(ran)
