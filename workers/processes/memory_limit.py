"""Limits the memory of a process that trains on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

# What RLIMIT_DATA counts and resident memory does not, and the other way round: each thread maps 8 MiB for
# its stack and touches little of it; pages of libraries become resident as a trial touches them and are no
# data.  Together trials of one thread are resident by 28 to 32 MiB more than is counted (46 of 51 requests of
# benchmarks/hard_limits.py, the others by less, as malloc's heap has holes).
THREAD_STACK_BYTES = 8 << 20
NUM_OTHER_THREADS = 4
LIBRARY_BYTES = 68 << 20
# Small blocks stay in malloc's heap, which fragments as a run goes on: a trial reached its bound at step 23
# where a run of 20 steps had stayed below it.  RAM has no hard wall at the bound, and ending a trial that
# fits costs more than reserving this much too little.
ROOM_BYTES = 192 << 20


def with_room(memory_cap_bytes: int) -> int:
    """Return the limit enforced for a CPU trial's cap: the cap, a tenth of it, and ROOM_BYTES."""
    return memory_cap_bytes + memory_cap_bytes // 10 + ROOM_BYTES


def without_room(limit_bytes: int) -> int:
    """Return the largest cap whose limit (`with_room`) is no more than this; 0 where there is none."""
    return max(0, (limit_bytes - ROOM_BYTES) * 10 // 11)


def data_segment_bytes() -> int:
    """Return the private writable memory that this process has mapped, in bytes (Linux; elsewhere 0)."""
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def limit_data_segment(memory_cap_bytes: int, *, num_threads: int, inherited_bytes: int) -> None:
    """Cap the memory of this process at `with_room(memory_cap_bytes)` over `inherited_bytes` (Linux).

    The cap is one of resident memory, as it is predicted and measured; what the kernel can enforce without
    rights is RLIMIT_DATA, on private writable memory that is mapped, touched or not.  With the malloc
    settings of the server's environment the two grow side by side.  An allocation beyond the cap fails in
    this process alone, as an exception.  RLIMIT_AS would not do: it counts what is reserved and files that
    are mapped, gigabytes of both for torch, and pages that other processes share.
    """
    if sys.platform == "linux":
        import resource

        untouched_bytes = THREAD_STACK_BYTES * (num_threads + NUM_OTHER_THREADS)
        wanted = inherited_bytes + with_room(memory_cap_bytes) + untouched_bytes - LIBRARY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard == resource.RLIM_INFINITY or wanted < hard:
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def lift_data_limit() -> None:
    """Undo `limit_data_segment`."""
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
