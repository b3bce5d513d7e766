"""Bound the RAM that a user's code takes while it is traced in this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from autosft.profiles.hardware.host import memory_of_host


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let the block take at most half of the RAM that is free; beyond, its allocations fail (Linux).

    A trace holds no tensors, but arrays of numpy are real: a loss that fills gigabytes for every row of a
    batch would have the kernel kill this process, and with it the study.  The limit is on private writable
    mappings of the process (RLIMIT_DATA), so that what other threads map meanwhile counts too.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    _, free_bytes = memory_of_host()
    limit = _data_bytes() + free_bytes // 2
    if before != resource.RLIM_INFINITY:
        limit = min(limit, before)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def _data_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmData"))
    return int(line.split()[1]) * 1024
