"""Simulate PyTorch's CUDA caching allocator.

Follows c10/cuda/CUDACachingAllocator.cpp of torch 2.13 for one device and one stream: sizes rounded to
512 B; a small pool (up to 1 MiB, from segments of 2 MiB) and a large pool (from segments of 20 MiB, or
from 10 MiB on of the size itself rounded up to 2 MiB); best fit at the lowest address; splitting; merging of
neighbours; when a new segment would exceed the cap, free segments are released and the request is retried.
Not simulated, because off by default: garbage collection by threshold, power-of-two rounding, private pools,
several streams.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort

MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
MIN_LARGE_BYTES = 10 << 20
ROUND_LARGE_BYTES = 2 << 20
_NO_LIMIT = 1 << 62
_EXPANDABLE_RANGE_BYTES = LARGE_SEGMENT_BYTES << 20  # larger than any device; page-aligned
_ADDRESS_BITS = 48  # a free block's key is size << 48 | address: ordered by size, then address


def rounded_bytes(num_bytes: int) -> int:
    """Return the minimum size of the block for a request of `num_bytes`."""
    return max(MIN_BLOCK_BYTES, (num_bytes + 511) & ~511)


def segment_bytes(size: int) -> int:
    """Return the size of the segment requested from the driver for a block of `size` (rounded) bytes."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES


class OutOfMemory(Exception):  # noqa: N818 - named after torch.OutOfMemoryError
    """No free block fits and a new segment would exceed the cap."""

    def __init__(self, requested_bytes: int, reserved_bytes: int) -> None:
        super().__init__(f"{requested_bytes:,} B requested with {reserved_bytes:,} B reserved")
        self.requested_bytes = requested_bytes
        self.reserved_bytes = reserved_bytes


class Block:
    """A range of a segment: live, free, or (expandable segments only) unmapped."""

    __slots__ = ("address", "free", "mapped", "next", "pool", "prev", "size")

    def __init__(self, address: int, size: int, pool: Pool) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.prev: Block | None = None
        self.next: Block | None = None
        self.free = False
        self.mapped = True


class Pool:
    """The free blocks of one size class, in best-fit order."""

    __slots__ = ("blocks", "is_small", "keys", "segment")

    def __init__(self, *, is_small: bool) -> None:
        self.is_small = is_small
        self.keys: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.segment: Block | None = None  # first block of the expandable segment

    def add(self, block: Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block

    def discard(self, block: Block) -> None:
        key = block.size << _ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]


class CachingAllocator:
    """One device's allocator.

    `cap_bytes` is the limit of `torch.cuda.set_per_process_memory_fraction`; `max_split_size_bytes` and
    `expandable_segments` are the settings of these names in PYTORCH_CUDA_ALLOC_CONF (the former in MiB
    there). `malloc` raises OutOfMemory where torch would; with `cap_grows` it raises the cap by what is
    missing instead.
    """

    def __init__(
        self,
        *,
        cap_bytes: int | None = None,
        max_split_size_bytes: int | None = None,
        expandable_segments: bool = False,
        cap_grows: bool = False,
    ) -> None:
        self.cap_bytes = _NO_LIMIT if cap_bytes is None else cap_bytes
        self.cap_grows = cap_grows
        self.max_split_size_bytes = _NO_LIMIT if max_split_size_bytes is None else max_split_size_bytes
        self.expandable_segments = expandable_segments
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.num_retries = 0  # how often cached segments were released to make room
        self._pools: dict[tuple[int, bool], Pool] = {}  # by stream, and whether it is small
        self._next_address = 0

    def malloc(self, num_bytes: int, *, stream: int = 0) -> Block:
        """Return a live block of at least `num_bytes`, for use in a stream, whose blocks no other one reuses.

        Raises OutOfMemory where the cap forbids it.
        """
        size = (num_bytes + 511) & ~511 or MIN_BLOCK_BYTES
        kind = (stream, size <= SMALL_BYTES)
        pool = self._pools.get(kind)
        if pool is None:
            pool = self._pools[kind] = Pool(is_small=kind[1])
        block = self._take_free(pool, size)
        if block is None:
            block = self._new_segment(pool, size)
            if block is None:
                self.num_retries += 1
                if self.max_split_size_bytes != _NO_LIMIT and not self.expandable_segments:
                    self._release_oversize(pool, size)
                    block = self._new_segment(pool, size)
                if block is None:
                    self.empty_cache()
                    block = self._new_segment(pool, size)
                if block is None and self.cap_grows:
                    self.cap_bytes = self.reserved_bytes + segment_bytes(size)
                    block = self._new_segment(pool, size)
                if block is None:
                    raise OutOfMemory(size, self.reserved_bytes)
        remaining = block.size - size
        if remaining and self._should_split(pool, size, remaining):
            rest = Block(block.address + size, remaining, pool)
            rest.prev = block
            rest.next = block.next
            if rest.next is not None:
                rest.next.prev = rest
            block.next = rest
            block.size = size
            rest.free = True
            pool.add(rest)
        block.free = False
        allocated = self.allocated_bytes + block.size
        self.allocated_bytes = allocated
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, allocated)
        return block

    def free(self, block: Block) -> None:
        """Return a live block to its pool, merged with free neighbours."""
        assert not block.free, "freed twice"
        pool = block.pool
        self.allocated_bytes -= block.size
        before, after = block.prev, block.next
        if before is not None and before.free and before.mapped:
            pool.discard(before)
            _absorb_next(before)
            block = before
        if after is not None and after.free and after.mapped:
            pool.discard(after)
            _absorb_next(block)
        block.free = True
        pool.add(block)

    def empty_cache(self) -> None:
        """Release free segments (expandable: free pages) to the driver."""
        for _, pool in sorted(self._pools.items(), key=lambda item: (item[0][0], not item[0][1])):
            for block in list(pool.blocks.values()):
                if self.expandable_segments:
                    self._unmap(block)
                elif block.prev is None and block.next is None:
                    self._release(block)

    def _take_free(self, pool: Pool, size: int) -> Block | None:
        keys = pool.keys
        index = bisect_left(keys, size << _ADDRESS_BITS)
        if index == len(keys):
            return None
        block = pool.blocks[keys[index]]
        if self.expandable_segments:
            # A block that can grow counts with the unmapped range behind it, so that it is not used up first.
            while index + 1 < len(keys) and _room(pool.blocks[keys[index + 1]]) < _room(block):
                index += 1
                block = pool.blocks[keys[index]]
        limit = self.max_split_size_bytes
        if size < limit <= block.size or (size >= limit and block.size >= size + LARGE_SEGMENT_BYTES):
            return None
        del pool.blocks[keys.pop(index)]
        return block

    def _should_split(self, pool: Pool, size: int, remaining: int) -> bool:
        if pool.is_small or self.expandable_segments:
            return remaining >= MIN_BLOCK_BYTES
        return size < self.max_split_size_bytes and remaining > SMALL_BYTES

    def _new_segment(self, pool: Pool, size: int) -> Block | None:
        segment = segment_bytes(size)
        if self.reserved_bytes + segment > self.cap_bytes:
            return None
        if self.expandable_segments:
            return self._map(pool, size)
        block = Block(self._next_address, segment, pool)
        self._next_address += segment
        self._reserve(segment)
        return block

    def _reserve(self, num_bytes: int) -> None:
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _release(self, block: Block) -> None:
        block.pool.discard(block)
        self.reserved_bytes -= block.size

    def _release_oversize(self, pool: Pool, size: int) -> None:
        """Release the smallest oversize segment that makes enough room, else the largest ones in turn."""
        limit = max(size, self.max_split_size_bytes)
        index = bisect_left(pool.keys, limit << _ADDRESS_BITS)
        if index < len(pool.keys):
            self._release(pool.blocks[pool.keys[index]])
            return
        released = 0
        while pool.keys and released < size:
            block = pool.blocks[pool.keys[-1]]
            if block.size < self.max_split_size_bytes:
                return
            released += block.size
            self._release(block)

    # Expandable segments: one address range per pool, mapped page by page.

    def _map(self, pool: Pool, size: int) -> Block:
        """Return a free block of at least `size`, removed from its pool; map the pages that are missing."""
        page = SMALL_SEGMENT_BYTES if pool.is_small else LARGE_SEGMENT_BYTES
        if pool.segment is None:
            pool.segment = Block(self._next_address, _EXPANDABLE_RANGE_BYTES, pool)
            pool.segment.free, pool.segment.mapped = True, False
            self._next_address += _EXPANDABLE_RANGE_BYTES
        block = self._first_stretch(pool.segment, size)
        if block.mapped:
            pool.discard(block)
        while not block.mapped or block.size < size:
            hole = block if not block.mapped else block.next
            assert hole is not None
            assert not hole.mapped
            wanted = size if hole is block else size - block.size
            mapped = min(hole.size, -(-wanted // page) * page)
            if mapped < hole.size:
                rest = Block(hole.address + mapped, hole.size - mapped, pool)
                rest.free, rest.mapped, rest.prev, rest.next = True, False, hole, hole.next
                if rest.next is not None:
                    rest.next.prev = rest
                hole.next, hole.size = rest, mapped
            hole.mapped = True
            self._reserve(mapped)
            if hole is not block:
                _absorb_next(block)
            after = block.next
            if after is not None and after.free and after.mapped:
                pool.discard(after)
                _absorb_next(block)
        return block

    @staticmethod
    def _first_stretch(block: Block, size: int) -> Block:
        """Return the first block of the first free or unmapped range that includes an unmapped block."""
        candidate: Block | None = block
        while candidate is not None:
            if candidate.free and not candidate.mapped:
                start = candidate
                if start.prev is not None and start.prev.free:
                    start = start.prev
                room = 0
                behind: Block | None = start
                while behind is not None and behind.free and room < size:
                    room += behind.size
                    behind = behind.next
                if room >= size:
                    return start
            candidate = candidate.next
        raise AssertionError("the address range of an expandable segment is never used up")

    def _unmap(self, block: Block) -> None:
        """Unmap the whole pages of a free block."""
        pool = block.pool
        page = SMALL_SEGMENT_BYTES if pool.is_small else LARGE_SEGMENT_BYTES
        first = -(-block.address // page) * page
        last = (block.address + block.size) // page * page
        if last <= first:
            return
        pool.discard(block)
        pieces = [
            (block.address, first, True),
            (first, last, False),
            (last, block.address + block.size, True),
        ]
        made = []
        for start, stop, mapped in pieces:
            if stop > start:
                piece = Block(start, stop - start, pool)
                piece.free, piece.mapped = True, mapped
                made.append(piece)
        ends = [block.prev, *made, block.next]
        for left, right in itertools.pairwise(ends):
            if left is not None:
                left.next = right
            if right is not None:
                right.prev = left
        if pool.segment is block:
            pool.segment = made[0]
        for piece in made:
            if piece.mapped:
                pool.add(piece)
            else:
                _merge_unmapped(piece, pool)
        self.reserved_bytes -= last - first


def _room(block: Block) -> int:
    after = block.next
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _absorb_next(block: Block) -> None:
    after = block.next
    assert after is not None
    block.size += after.size
    block.next = after.next
    if after.next is not None:
        after.next.prev = block


def _merge_unmapped(block: Block, pool: Pool) -> None:
    if block.next is not None and not block.next.mapped:
        _absorb_next(block)
    before = block.prev
    if before is not None and not before.mapped:
        _absorb_next(before)
        if pool.segment is block:
            pool.segment = before
