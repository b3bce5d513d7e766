"""Replays what a harness did on meta tensors through the product's simulated allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from autosft.profiles.memory.allocator.caching_allocator import CachingAllocator
from autosft.profiles.memory.program.blocks import Trace
from autosft.profiles.memory.program.program import Program, Shape
from autosft.profiles.memory.program.replay import Replay

#: cuBLAS takes this workspace from torch's allocator on its first call, one per handle and stream, on every
#: architecture before Hopper (":4096:2:16:8", aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_WORKSPACE_BYTES = 8_519_680

EMPTY_CACHE = "empty cache"


def replay_program(
    program: Program,
    runs: Iterable[tuple[str, Shape] | str],
    *,
    warm_up_bytes: int = 0,
    program_at: Callable[[Shape], Program] | None = None,
) -> CachingAllocator:
    """Run "setup" and then segments of a program in the given order, uncapped; return the allocator.

    `warm_up_bytes` are taken and given back before the parameters come, as transformers' loader does to make
    one large segment for them.  `program_at` gives the program of a shape where there is none for all.
    """
    allocator = CachingAllocator()
    if warm_up_bytes:
        allocator.free(allocator.malloc(warm_up_bytes))
    replay = Replay(allocator)
    replay.run(program.segments["setup"], Shape(batch=1, seq=1, scored=1))
    allocator.malloc(CUBLAS_WORKSPACE_BYTES)
    for run in runs:
        if isinstance(run, str):
            assert run == EMPTY_CACHE
            allocator.empty_cache()
        else:
            name, shape = run
            at = program if program_at is None else program_at(shape)
            replay.run(at.segments[name], shape)
    return allocator


def replay_trace(trace: Trace) -> CachingAllocator:
    """Run a whole trace at the shape at which it was taken, uncapped; return the allocator."""
    allocator = CachingAllocator()
    blocks = {}
    for segment in trace.segments:
        for event in segment.events:
            if event >= 0:
                blocks[event] = allocator.malloc(trace.births[event].size)
            else:
                allocator.free(blocks.pop(~event))
        if segment.name == "setup":
            allocator.malloc(CUBLAS_WORKSPACE_BYTES)
    return allocator
