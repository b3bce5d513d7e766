"""Bound the RAM that a user's code takes while it is traced in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from autosft.profiles.bounded_work import bounded_ram
from autosft.profiles.hardware.host import memory_of_host


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let the block take at most half of the RAM that is free; beyond, its allocations fail.

    A trace holds no tensors, but arrays of numpy are real: a loss that fills gigabytes for every row of a
    batch would have the kernel kill this process, and with it the study.
    """
    _, free_bytes = memory_of_host()
    with bounded_ram(free_bytes // 2):
        yield
