"""Limit the memory of a process that trains on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

# RLIMIT_DATA and resident memory differ: each thread maps 8 MiB for its stack and touches little of it; pages
# of libraries become resident when they are touched, but are not data.  In sum, trials of one thread have 28
# to 32 MiB more resident than is counted (46 of 51 requests of benchmarks/hard_limits.py; the others less, as
# malloc's heap has holes).
THREAD_STACK_BYTES = 8 << 20
NUM_OTHER_THREADS = 4
LIBRARY_BYTES = 68 << 20
# Small blocks stay in malloc's heap, which fragments over a run: a trial reached its bound at step 23 where a
# run of 20 steps had stayed below it.  RAM has no hard limit at the bound, and ending a trial that fits costs
# more than reserving this much too little.
ROOM_BYTES = 192 << 20


def with_room(memory_cap_bytes: int) -> int:
    """Return the limit enforced for a CPU trial's cap: the cap, a tenth of it, and ROOM_BYTES."""
    return memory_cap_bytes + memory_cap_bytes // 10 + ROOM_BYTES


def without_room(limit_bytes: int) -> int:
    """Return the largest cap whose limit (`with_room`) is at most `limit_bytes`; 0 where there is none."""
    return max(0, (limit_bytes - ROOM_BYTES) * 10 // 11)


def data_segment_bytes() -> int:
    """Return the private writable memory that this process has mapped, in bytes (Linux; elsewhere 0)."""
    if sys.platform != "linux":
        return 0
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def limit_data_segment(
    memory_cap_bytes: int, *, num_threads: int, inherited_bytes: int, kernel_bytes: int = 0
) -> None:
    """Cap the memory of this process at `with_room(memory_cap_bytes)` over `inherited_bytes` (Linux).

    The cap is on resident memory, which is predicted and measured; what the kernel can enforce without
    privileges is RLIMIT_DATA, on private writable mappings, touched or not.  With the malloc settings of the
    server's environment the two grow in step, but for `kernel_bytes` that compiled kernels map and never
    touch (`profiles.memory.host_kernels`).  An allocation beyond the limit raises an exception in this
    process only.  RLIMIT_AS would not work: it counts reserved address space and mapped files, gigabytes of
    both for torch, and shared pages.
    """
    if sys.platform == "linux":
        import resource

        untouched_bytes = THREAD_STACK_BYTES * (num_threads + NUM_OTHER_THREADS) + kernel_bytes
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
