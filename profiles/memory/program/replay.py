"""Replay segments one by one through a simulated allocator, in Python.

`run.Run` replays whole runs, faster; this serves tests and benchmarks that choose segments themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from autosft.profiles.memory.allocator.caching_allocator import Block, CachingAllocator, Pool
from autosft.profiles.memory.program.program import CarryName, CompiledSegment, Shape

_NO_BLOCK = Block(0, 0, Pool(is_small=True))


@dataclass(slots=True)
class Replay:
    """Runs segments through a simulated allocator, in any order and at any shape."""

    allocator: CachingAllocator
    carried: dict[CarryName, deque[Block]] = field(default_factory=dict)

    def run(self, segment: CompiledSegment, shape: Shape) -> None:
        """Replay one segment; raises OutOfMemory where the allocator does."""
        self.run_sizes(segment, segment.sizes_at(shape))

    def run_sizes(self, segment: CompiledSegment, sizes: Sequence[int]) -> None:
        """Replay one segment with the given sizes in bytes of its local blocks."""
        malloc, free = self.allocator.malloc, self.allocator.free
        num_local = len(sizes)
        blocks: list[Block] = [_NO_BLOCK] * num_local
        for event in segment.events:
            if event >= 0:
                blocks[event] = malloc(sizes[event])
            else:
                index = ~event
                if index < num_local:
                    free(blocks[index])
                else:
                    kept = self.carried.get(segment.ends[index - num_local])
                    if kept:
                        free(kept.popleft())
        for local, name in segment.survivors:
            self.carried.setdefault(name, deque()).append(blocks[local])
