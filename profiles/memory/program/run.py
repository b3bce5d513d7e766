"""Compute the live bytes of a run, a sequence of segments at given shapes, and replay its allocations.

How segments are linked (which block ends in which later segment) does not depend on their shapes.  It is
computed once for a sequence of segments; another setting then costs a few small matrix products for live
bytes, and one replay of all requests for the allocator's peak.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autosft.profiles.memory.allocator.caching_allocator import (
    LARGE_SEGMENT_BYTES,
    rounded_bytes,
)
from autosft.profiles.memory.allocator.options import AllocatorOptions
from autosft.profiles.memory.allocator.replay import STREAM_SHIFT, Replayed, replay, smallest_cap
from autosft.profiles.memory.program.blocks import STREAMS, Birth, Owner, Phase, unique_rows
from autosft.profiles.memory.program.program import CarryName, CompiledSegment, Shape, features

_OWNERS = tuple(Owner)
_PHASES = tuple(Phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The peak of live blocks: bytes, phase, segment and owners."""

    allocated_bytes: int
    phase: Phase
    segment: str
    by_owner: Mapping[Owner, int]
    largest: tuple[tuple[Birth, int], ...]  # the largest blocks live at the peak, with their sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a device holds in addition to the traced blocks, and how these are sharded.

    `building` blocks live for a moment once the model is there; `kept` ones are allocated after them and
    stay; `passing` ones live during each forward and backward pass, `generating` ones while prompts are
    answered (upper bounds: layers are gathered one by one); parameters, gradients, optimizer state and the
    optimizer's temporaries are split over `num_shards` devices.
    """

    building: tuple[tuple[Owner, int], ...] = ()
    kept: tuple[tuple[Owner, int], ...] = ()
    passing: tuple[tuple[Owner, int], ...] = ()
    generating: tuple[tuple[Owner, int], ...] = ()
    num_shards: int = 1


class Run:
    """Segments in order of execution, each at its shape, starting without any blocks."""

    def __init__(self, steps: Sequence[tuple[CompiledSegment, Shape]], beside: Beside | None = None) -> None:
        self.steps = tuple(steps)
        self.beside = beside or Beside()
        self._joined = joined(tuple(segment for segment, _ in self.steps))
        at = {shape: features(shape) for _, shape in self.steps}
        # For each step: the distinct block sizes, the bytes live at its candidate peaks, and after it; steps
        # of the same segment are computed together.
        self._sizes: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(self.steps)
        self._tops = list(self._sizes)
        self._kept = [0] * len(self.steps)
        for segment, alike in self._joined.steps_of.items():
            parts = parts_of(segment)
            monomials = np.stack([at[self.steps[step][1]] for step in alike])
            sizes = parts.sizes(monomials, self.beside.num_shards)
            tops, kept = parts.live_bytes(sizes)
            for row, step in enumerate(alike):
                self._sizes[step], self._tops[step], self._kept[step] = sizes[row], tops[row], int(kept[row])
        self._all_sizes = np.concatenate(self._sizes)
        self._known_levels: tuple[list[int], list[int]] | None = None

    def live_bytes(self) -> list[int]:
        """Return the bytes that are live after each step."""
        return self._levels()[1]

    def allocated_bytes(self) -> int:
        """Return the peak of live bytes."""
        return max(self._levels()[0])

    def peak(self) -> Peak:
        """Return the peak of live bytes, and what is live at it."""
        peaks, _ = self._levels()
        step = int(np.argmax(peaks))
        levels = self._levels_within(step, 0)
        segment = self.steps[step][0]
        top = int(parts_of(segment).candidates[int(np.argmax(levels))])
        joined = self._joined
        event = joined.first_event[step] + top - int(np.searchsorted(joined.skipped[step], top))
        alive = np.flatnonzero((joined.birth_event <= event) & (joined.death_event > event))
        sizes = self._all_sizes[joined.size_of[alive]]
        totals = np.bincount(joined.owner_of[alive], weights=sizes, minlength=len(_OWNERS))
        by_owner = {owner: int(total) for owner, total in zip(_OWNERS, totals, strict=True)}
        for owner, num_bytes in self._beside(step):
            by_owner[owner] += num_bytes
        biggest = np.argsort(-sizes, kind="stable")[:5]
        return Peak(
            allocated_bytes=sum(by_owner.values()),
            phase=segment.phases[top],
            segment=segment.name,
            by_owner=by_owner,
            largest=tuple((joined.birth(int(alive[i])), int(sizes[i])) for i in biggest),
        )

    def peak_by_phase(self) -> dict[Phase, int]:
        """Return the peak of live bytes in each phase of the run."""
        _, after = self._levels()
        peaks: dict[Phase, int] = {}
        for step, (segment, _) in enumerate(self.steps):
            live = after[step - 1] if step else 0
            beside = sum(rounded_bytes(num_bytes) for _, num_bytes in self._beside(step))
            ended = self._ended(step)
            for phase, (counts, num_ended) in phase_tops_of(segment).items():
                levels = live + counts @ self._sizes[step] - ended[num_ended]
                peaks[phase] = max(peaks.get(phase, 0), int(levels.max()) + beside)
        return peaks

    def replay(
        self, options: AllocatorOptions, *, cap_bytes: int | None = None, cap_grows: bool = False
    ) -> Replayed:
        """Replay the run through the allocator."""
        events, sizes = self._requests()
        return replay(events, sizes, options, cap_bytes=cap_bytes, cap_grows=cap_grows)

    def need_bytes(self, options: AllocatorOptions, *, tolerance: float) -> tuple[int, int]:
        """Return (smallest sufficient cap, peak reserved without a cap).

        The cap is searched to within `tolerance`, a share of what is reserved without one.
        """
        events, sizes = self._requests()
        low = self.allocated_bytes()
        tried: dict[int, int] = {}

        def succeeds(cap: int) -> bool:
            return replay(events, sizes, options, cap_bytes=cap).succeeded

        def grow(cap: int) -> int:
            if cap not in tried:
                grown = replay(events, sizes, options, cap_bytes=cap, cap_grows=True).cap_bytes
                assert grown is not None
                tried[cap] = grown
            return tried[cap]

        beside = threading.Thread(target=grow, args=(low,))  # on another core: replays release the GIL
        beside.start()
        uncapped = replay(events, sizes, options)
        beside.join()
        high = uncapped.reserved_bytes
        if options.expandable_segments:
            high += LARGE_SEGMENT_BYTES  # torch requires room for a whole segment even where pages would do
        tolerance_bytes = max(2 << 20, int(high * tolerance))
        if high - low <= tolerance_bytes:
            return high, uncapped.reserved_bytes
        need = smallest_cap(succeeds, grow, low_bytes=low, high_bytes=high, tolerance_bytes=tolerance_bytes)
        return need, uncapped.reserved_bytes

    def _requests(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return events and sizes of all blocks, including untraced ones (`Beside`)."""
        joined = self._joined
        sizes = self._all_sizes[joined.size_of] + (joined.stream_of << STREAM_SHIFT)
        building, kept = self.beside.building, self.beside.kept
        added = [num_bytes for _, num_bytes in (*building, *kept)]
        first, *others = np.split(joined.events, joined.first_event[1:])
        built = np.arange(len(building)) + len(sizes)
        pieces: list[NDArray[Any]] = [first, built, ~built]
        pieces.append(np.arange(len(kept)) + len(sizes) + len(building))
        for (segment, _), piece in zip(self.steps[1:], others, strict=True):
            here = self._passing(segment)
            blocks = np.arange(len(here)) + len(sizes) + len(added)
            added += [num_bytes for _, num_bytes in here]
            pieces += [blocks, piece, ~blocks]
        return np.concatenate(pieces).astype(np.int32), np.concatenate([sizes, np.array(added, np.int64)])

    def _beside(self, step: int) -> tuple[tuple[Owner, int], ...]:
        """Return the untraced blocks that are live during a step."""
        if step == 0:
            return self.beside.building
        return self.beside.kept + self._passing(self.steps[step][0])

    def _passing(self, segment: CompiledSegment) -> tuple[tuple[Owner, int], ...]:
        """Return the untraced blocks that live during a segment only."""
        if not is_pass(segment):
            return ()
        return self.beside.passing + (self.beside.generating if segment.name.startswith("generate") else ())

    def _levels(self) -> tuple[list[int], list[int]]:
        """Return the peak of live bytes within each step, and what is live after it."""
        if self._known_levels is None:
            peaks, after, live = [], [], 0
            for step in range(len(self.steps)):
                beside = sum(rounded_bytes(num_bytes) for _, num_bytes in self._beside(step))
                peaks.append(int(self._levels_within(step, live).max(initial=live)) + beside)
                live += self._kept[step] - int(self._ended(step)[-1])
                after.append(live)
            self._known_levels = peaks, after
        return self._known_levels

    def _levels_within(self, step: int, live: int) -> NDArray[np.int64]:
        """Return live bytes at the candidate peaks of a step."""
        parts = parts_of(self.steps[step][0])
        levels: NDArray[np.int64] = live + self._tops[step] - self._ended(step)[parts.num_ended]
        return levels

    def _ended(self, step: int) -> NDArray[np.int64]:
        """Return the cumulative bytes of earlier steps' blocks that a step frees, by their number."""
        first, stop = self._joined.first_ended[step : step + 2]
        total = self._total_ended[first : stop + 1]
        ended: NDArray[np.int64] = total - total[0]
        return ended

    @functools.cached_property
    def _total_ended(self) -> NDArray[np.int64]:
        """Return the cumulative bytes of carried blocks freed over the whole run, by their number."""
        sizes = np.append(self._all_sizes, 0)[self._joined.size_of_ended]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def is_pass(segment: CompiledSegment) -> bool:
    """Return whether a segment runs the model: a micro batch's passes, or an evaluation."""
    return segment.name.split()[0] in ("micro", "evaluate", "generate")


# What does not depend on shapes

#: Blocks of these owners are sharded, as are the optimizer's temporaries.
_SHARDED = (Owner.PARAMETER, Owner.GRADIENT, Owner.OPTIMIZER_STATE)


class Parts:
    """A segment's distinct sizes, and its candidate peaks: the events that can be the peak for some sizes."""

    def __init__(self, segment: CompiledSegment) -> None:
        self.events = np.asarray(segment.events, np.int32).reshape(-1)
        sharded = [birth.owner in _SHARDED or birth.phase is Phase.OPTIMIZER for birth in segment.births]
        described = np.column_stack([segment.coefficients, np.array(sharded, np.float64)])
        distinct, self.size_of = unique_rows(described)  # block -> row
        self.rows, self.is_sharded = distinct[:, :-1], distinct[:, -1] > 0
        self.owner_of = np.array([_OWNERS.index(birth.owner) for birth in segment.births], np.int64)
        self.stream_of = np.array([STREAMS.get(birth.operator, 0) for birth in segment.births], np.int64)
        is_birth = self.events >= 0
        live, ended = live_counts(segment, self)
        self.kept = live[-1].astype(np.float64) if len(live) else np.zeros(len(self.rows))
        tops = np.flatnonzero(is_birth & np.append(~is_birth[1:], True))
        front = tops[not_dominated(np.column_stack([live[tops], np.negative(ended[tops])]))]
        self.candidates = front
        self.counts = live[front].astype(np.float64)
        self.num_ended = ended[front]

    def live_bytes(self, sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the live bytes of the segment's own blocks at its candidates, and after it, by row of sizes.

        Uses floating point, whose matrix products are fast and exact up to 2**53 bytes.
        """
        exact = sizes.astype(np.float64)
        return (exact @ self.counts.T).astype(np.int64), (exact @ self.kept).astype(np.int64)

    def sizes(self, at: NDArray[np.float64], num_shards: int = 1) -> NDArray[np.int64]:
        """Return the rounded distinct sizes in bytes, by row of monomials."""
        raw = np.rint(at @ self.rows.T).astype(np.int64)
        if num_shards > 1:
            raw = np.where(self.is_sharded, -(-raw // num_shards), raw)
        rounded: NDArray[np.int64] = np.maximum(raw + 511 & ~511, 512)
        return rounded


def live_counts(segment: CompiledSegment, parts: Parts) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return how many blocks of each size are live after each event, and how many carried ones have ended."""
    is_birth = parts.events >= 0
    block = np.where(is_birth, parts.events, ~parts.events)
    is_own = block < len(segment.births)
    change = np.zeros((len(parts.events), len(parts.rows)), np.int32)
    own = np.flatnonzero(is_own)
    change[own, parts.size_of[block[own]]] = np.where(is_birth[own], 1, -1)
    return np.cumsum(change, axis=0, dtype=np.int32), np.cumsum(~is_own, dtype=np.int32)


def not_dominated(counts: NDArray[np.int32]) -> NDArray[np.intp]:
    """Return the rows that no other row equals or exceeds in every column, in ascending order."""
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    found = []
    while len(order):
        best = order[0]
        found.append(best)
        order = order[(counts[order] > counts[best]).any(axis=1)]
    return np.sort(np.array(found, np.intp))


@functools.lru_cache(maxsize=256)
def parts_of(segment: CompiledSegment) -> Parts:
    return Parts(segment)


@functools.lru_cache(maxsize=256)
def phase_tops_of(
    segment: CompiledSegment,
) -> dict[Phase, tuple[NDArray[np.int64], NDArray[np.int32]]]:
    """Return the candidate peaks of each phase of a segment: live blocks by size, and ended carried ones."""
    parts = parts_of(segment)
    live, ended = live_counts(segment, parts)
    is_top = (parts.events >= 0) & np.append(parts.events[1:] < 0, True)
    phase_of = np.array([_PHASES.index(phase) for phase in segment.phases], np.int64)
    tops = {}
    for number in np.unique(phase_of).tolist():
        inside = phase_of == number
        # a phase may end at its peak
        at = np.flatnonzero(inside & (is_top | np.append(phase_of[1:] != number, True)))
        front = at[not_dominated(np.column_stack([live[at], np.negative(ended[at])]))]
        tops[_PHASES[number]] = (live[front].astype(np.int64), ended[front])
    return tops


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A sequence of segments, with blocks numbered over all of them."""

    segments: tuple[CompiledSegment, ...]
    events: NDArray[np.int32]
    first_event: tuple[int, ...]  # of each segment
    skipped: tuple[NDArray[np.int64], ...]  # events of each segment that end a block which does not exist
    first_block: NDArray[np.int64]  # of each segment
    size_of: NDArray[np.int64]  # block -> index among the distinct sizes of all segments
    owner_of: NDArray[np.int64]
    stream_of: NDArray[np.int64]
    birth_event: NDArray[np.int64]
    death_event: NDArray[np.int64]  # beyond the last event if it never dies
    steps_of: Mapping[CompiledSegment, Sequence[int]]  # positions of each distinct segment
    first_ended: tuple[int, ...]  # of each segment, among the carried blocks that segments end
    size_of_ended: NDArray[np.int64]  # as `size_of`; -1 where the block to end does not exist

    def birth(self, block: int) -> Birth:
        """Return the birth of a block."""
        segment = int(np.searchsorted(self.first_block, block, side="right")) - 1
        return self.segments[segment].births[block - int(self.first_block[segment])]


@functools.lru_cache(maxsize=64)
def joined(segments: tuple[CompiledSegment, ...]) -> Joined:
    """Link segments: blocks that survive one end in a later one, oldest first."""
    carried: dict[CarryName, deque[int]] = defaultdict(deque)
    events, first_event, skipped, first_block, size_of, owner_of, ended = [], [], [], [], [], [], []
    stream_of = []
    num_blocks = num_events = num_sizes = 0
    for segment in segments:
        parts = parts_of(segment)
        num_local = len(segment.births)
        first_event.append(num_events)
        first_block.append(num_blocks)
        size_of.append(parts.size_of + num_sizes)
        owner_of.append(parts.owner_of)
        stream_of.append(parts.stream_of)
        before = [queue.popleft() if (queue := carried[name]) else -1 for name in segment.ends]
        ended.append(np.array(before, np.int64))
        number = np.concatenate([np.arange(num_blocks, num_blocks + num_local), ended[-1]]).astype(np.int32)
        local = parts.events
        numbered = np.where(local >= 0, number[np.maximum(local, 0)], ~number[np.maximum(~local, 0)])
        known = (local >= 0) | (number[np.maximum(~local, 0)] >= 0)
        events.append(numbered[known].astype(np.int32))
        skipped.append(np.flatnonzero(~known))
        for block, name in segment.survivors:
            carried[name].append(num_blocks + block)
        num_blocks += num_local
        num_events += len(events[-1])
        num_sizes += len(parts.rows)
    flat = np.concatenate(events)
    steps_of: dict[CompiledSegment, list[int]] = defaultdict(list)
    for step, segment in enumerate(segments):
        steps_of[segment].append(step)
    sizes, blocks = np.concatenate(size_of), np.concatenate(ended)
    birth_event = np.zeros(num_blocks, np.int64)
    death_event = np.full(num_blocks, len(flat), np.int64)
    positions = np.arange(len(flat))
    is_birth = flat >= 0
    birth_event[flat[is_birth]] = positions[is_birth]
    death_event[~flat[~is_birth]] = positions[~is_birth]
    return Joined(
        segments=segments,
        events=flat,
        first_event=tuple(first_event),
        skipped=tuple(skipped),
        first_block=np.array(first_block),
        size_of=sizes,
        owner_of=np.concatenate(owner_of),
        stream_of=np.concatenate(stream_of),
        birth_event=birth_event,
        death_event=death_event,
        steps_of=steps_of,
        first_ended=tuple(np.cumsum([0, *map(len, ended)]).tolist()),
        size_of_ended=np.where(blocks >= 0, sizes[blocks], -1),
    )
