"""Replay a long sequence of requests through the simulated allocator.

In C where the machine has a C compiler, which Triton needs too: replay.c is compiled into the user's cache
folder on first use, in a fifth of a second.  Elsewhere in Python, with the same result, twenty times slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autosft.profiles.memory.allocator.caching_allocator import Block, OutOfMemory
from autosft.profiles.memory.allocator.options import AllocatorOptions
from autosft.profiles.own_folders import cache_folder

#: A requested size has its block's stream in the bits from here on (see replay.c).
STREAM_SHIFT = 56
COMPILERS = ("cc", "gcc", "clang")
COMPILE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """The result of a replay."""

    succeeded: bool  # False: the cap was exceeded; the peaks are those up to there
    allocated_bytes: int  # peak
    reserved_bytes: int  # peak
    cap_bytes: int | None  # at the end; raised as far as necessary with `cap_grows`
    num_retries: int


def replay(
    events: NDArray[np.int32],
    sizes: NDArray[np.int64],
    options: AllocatorOptions,
    *,
    cap_bytes: int | None = None,
    cap_grows: bool = False,
) -> Replayed:
    """Replay allocations (n: block n of `sizes[n]` bytes) and frees (~n) under a cap.

    Sizes have their block's stream from bit `STREAM_SHIFT` on, 0 where there is only one.
    `cap_grows`: raise the cap by what a request lacks, instead of failing.
    """
    library = _library()
    if library is None:
        return replay_in_python(events, sizes, options, cap_bytes=cap_bytes, cap_grows=cap_grows)
    events, sizes = np.ascontiguousarray(events, np.int32), np.ascontiguousarray(sizes, np.int64)
    result = np.zeros(5, np.int64)
    status = library.replay(
        events.ctypes.data, len(events), sizes.ctypes.data, len(sizes),
        -1 if cap_bytes is None else cap_bytes,
        -1 if options.max_split_size_bytes is None else options.max_split_size_bytes,
        options.expandable_segments, cap_grows, result.ctypes.data,
    )  # fmt: skip
    if status < 0:
        raise MemoryError
    allocated, reserved, cap, retries, _ = result.tolist()
    return Replayed(
        succeeded=status == 0,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        cap_bytes=None if cap_bytes is None else cap,
        num_retries=retries,
    )


def replay_in_python(
    events: NDArray[np.int32],
    sizes: NDArray[np.int64],
    options: AllocatorOptions,
    *,
    cap_bytes: int | None = None,
    cap_grows: bool = False,
) -> Replayed:
    """Do what `replay` does, without a C compiler."""
    allocator = options.allocator(cap_bytes, cap_grows=cap_grows)
    requested: list[int] = sizes.tolist()
    live: dict[int, Block] = {}
    succeeded = True
    try:
        for event in events.tolist():
            if event >= 0:
                stream, num_bytes = divmod(requested[event], 1 << STREAM_SHIFT)
                live[event] = allocator.malloc(num_bytes, stream=stream)
            else:
                allocator.free(live.pop(~event))
    except OutOfMemory:
        succeeded = False
    return Replayed(
        succeeded=succeeded,
        allocated_bytes=allocator.peak_allocated_bytes,
        reserved_bytes=allocator.peak_reserved_bytes,
        cap_bytes=None if cap_bytes is None else allocator.cap_bytes,
        num_retries=allocator.num_retries,
    )


def smallest_cap(
    succeeds: Callable[[int], bool],
    grow: Callable[[int], int],
    *,
    low_bytes: int,
    high_bytes: int,
    tolerance_bytes: int,
) -> int:
    """Return a sufficient cap that is at most `tolerance_bytes` above an insufficient one.

    `grow(cap)` runs under a cap that is raised where a request needs it, and returns the final cap: `cap`
    itself where that suffices, else a good guess at a sufficient one.  `low_bytes` is at most the result (the
    peak of live tensors), `high_bytes` is sufficient (what an uncapped run reserves).  Rarely, a larger cap
    fails where a smaller one succeeds, because other blocks are split; the result is then one of the
    boundaries.
    """
    cap = first = low_bytes
    while (grown := grow(cap)) > cap:
        low_bytes = cap
        cap = max(grown, cap + tolerance_bytes) if cap > first else grown
        if cap >= high_bytes:
            break
    else:
        high_bytes = cap
    probe = high_bytes - tolerance_bytes
    while high_bytes - low_bytes > tolerance_bytes:
        if succeeds(probe):
            high_bytes = probe
        else:
            low_bytes = probe
        probe = (low_bytes + high_bytes) // 2
    return high_bytes


@functools.cache
def _library() -> Any:
    """Return the compiled replay.c, None where it cannot be compiled."""
    source = files("autosft.profiles.memory.allocator").joinpath("replay.c").read_bytes()
    folder = cache_folder() / "compiled"
    path = folder / f"replay-{hashlib.sha256(source + _machine()).hexdigest()[:16]}.so"
    try:
        if not path.exists() and not _compile(source, path):
            return None
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    library.replay.argtypes = [
        pointer, word, pointer, word, word, word, ctypes.c_int, ctypes.c_int, pointer,
    ]  # fmt: skip
    library.replay.restype = ctypes.c_int
    return library


def _machine() -> bytes:
    import platform

    return "|".join((platform.system(), platform.machine(), *platform.libc_ver())).encode()


def _compile(source: bytes, path: Path) -> bool:
    """Compile into `path` atomically: other processes may do the same."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None or os.name == "nt":
        return False
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        text, made = Path(folder, "replay.c"), Path(folder, "replay.so")
        text.write_bytes(source)
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(text)]
        try:
            ended = subprocess.run(command, capture_output=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return False
        if ended.returncode != 0:
            return False
        made.replace(path)
    return True
