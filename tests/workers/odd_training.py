"""Training functions that do other things than train; they run in the processes of test_process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from autosft.studies.trial import AttemptEnd, Measurement, StopReason, TrialJob
from tests.workers.scripted import end

Report = Callable[[Measurement], None]
StopRequested = Callable[[], StopReason | None]


def look_around(job: TrialJob, report: Report, stop_requested: StopRequested) -> AttemptEnd:
    """Write what a process is given into its log."""
    seen = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "sid": os.getsid(0),
        "pgid": os.getpgid(0),
        "threads": os.environ["OMP_NUM_THREADS"],
        "cuda": os.environ["CUDA_VISIBLE_DEVICES"],
        "fds": [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.exists()],
    }
    print(json.dumps(seen))
    return end(job)


def take_600_mib(job: TrialJob, report: Report, stop_requested: StopRequested) -> AttemptEnd:
    held = [bytearray(100 << 20) for _ in range(6)]
    assert len(held) == 6
    return end(job)


def leave_children(job: TrialJob, report: Report, stop_requested: StopRequested) -> AttemptEnd:
    """Start one process in the own group and one that has left it, and write their pids into the log."""
    sleep = [sys.executable, "-c", "import signal; signal.pause()"]
    for new_session in (False, True):
        print(subprocess.Popen(sleep, start_new_session=new_session).pid)
    return end(job)


_prepared_for: list[int] = []


def prepare(job: TrialJob) -> None:
    """Load ahead, which fails for trial 13."""
    if job.trial == 13:
        raise OSError("nothing to load")
    _prepared_for.append(job.trial)


def tell_prepared(job: TrialJob, report: object, stop_requested: object) -> AttemptEnd:
    """Say in the log which job was prepared for in this process."""
    print(json.dumps({"pid": os.getpid(), "prepared_for": _prepared_for}), flush=True)
    return end(job)
