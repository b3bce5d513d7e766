"""Bound what code of others takes while it runs in this process: processor time and RAM."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from autosft.profiles.errors import UserError


class TooMuchWorkError(UserError):
    """What ran took more processor time, or more RAM, than it may."""


@contextlib.contextmanager
def bounded_ram(more_bytes: int) -> Iterator[None]:
    """Let the block take at most `more_bytes` of RAM; beyond, allocations fail with MemoryError (Linux).

    The limit is on private writable mappings of the process (RLIMIT_DATA), so that what other threads map
    meanwhile counts too.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + more_bytes
    if before != resource.RLIM_INFINITY:
        limit = min(limit, before)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def _data_bytes() -> int:
    """Return the private writable mappings of this process, its stack included."""
    return int(Path("/proc/self/statm").read_bytes().split()[5]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def bounded_time(limit_s: float, *, what: str, remedy: str | None = None) -> Iterator[None]:
    """Let the block, `what` for messages, take at most `limit_s` of processor time.  Raises TooMuchWorkError.

    In the main thread of a Unix process, where Python hears signals; elsewhere nothing is bounded.  What is
    bounded is Python code: a call into C is over before it is noticed.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooMuchWorkError(f"{what} takes more than {limit_s:.3g} s.", remedy=remedy)

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
