"""Cleans up after a driver that died.  Standard library only: it starts in 15 ms and outlives all else.

Run as `python -I watchdog.py RUN_DIR DRIVER_PID` with a pipe as standard input.  When the driver closes the
pipe or dies, for whatever reason, every process of its run is killed and its folder removed.  Ray's own
agents would stay for more than half a minute, and a driver that was killed cannot clean up.

A process belongs to a run if it was started with the run's folder in `AUTOSFT_RUN`, writes its output to a
file below that folder, is one of Ray's with a file open there (these rewrite their environment, and are named
"ray::…"), or descends from such a process.  A process that only reads a file there, such as an editor, does
not belong to it.  Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

RUN_VARIABLE = "AUTOSFT_RUN"
#: The file of a run's folder that its driver holds locked.  Other drivers that check the lock have it open
#: for a moment, without belonging to the run.
LOCK_NAME = "lock"


def members(run_dir: str, *, spare: frozenset[int]) -> list[int]:
    """Return the processes of a run except `spare`."""
    marker = f"{RUN_VARIABLE}={run_dir}\0".encode()
    parents: dict[int, int] = {}
    ours: set[int] = set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended, or belongs to another user
            state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":
                continue
            parents[pid] = int(parent)
            if marker in Path(entry.path, "environ").read_bytes() + b"\0" or _has_open(entry.path, run_dir):
                ours.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in ours - spare} - ours:
        ours |= more
    return sorted(ours - spare)


def _has_open(process: str, run_dir: str) -> bool:
    """Whether a process writes its output below a run's folder, or is one of Ray's with a file open there."""
    is_rays = Path(process, "cmdline").read_bytes().startswith(b"ray")
    for link in os.scandir(f"{process}/fd"):
        if not is_rays and link.name not in ("1", "2"):
            continue
        with contextlib.suppress(OSError):
            target = str(Path(link.path).readlink())
            if target.startswith(f"{run_dir}/") and target != f"{run_dir}/{LOCK_NAME}":
                return True
    return False


def sweep(run_dir: str, *, spare: frozenset[int], timeout_s: float = 5.0) -> list[int]:
    """Kill the processes of a run until none is left, then remove its folder; return those that survived."""
    deadline = time.monotonic() + timeout_s
    while (left := members(run_dir, spare=spare)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(run_dir, ignore_errors=True)
    return left


def main() -> None:
    run_dir, driver_pid = sys.argv[1], int(sys.argv[2])
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    while os.read(0, 4096):
        pass
    sweep(run_dir, spare=frozenset({os.getpid(), driver_pid}))


if __name__ == "__main__":
    main()
