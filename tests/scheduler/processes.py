"""What tests of clusters ask of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from autosft.scheduler.cluster import watchdog

ROOT = Path(__file__).parents[2]
TRAIN = "tests.workers.scripted:train"
#: Within which nothing of a dead driver may be left: 10 s on a quiet machine, and what a busy one adds.
LIMIT_S = 60.0


def wait_for(condition: Callable[[], bool], *, timeout_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def members(run_dir: Path) -> list[int]:
    return watchdog.members(str(run_dir), spare=frozenset({os.getpid()}))
