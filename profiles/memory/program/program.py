"""A step as a program: births and deaths of blocks whose sizes are polynomials in the batch's shape.

A program is made from traces of a shallow model at a few shapes, and stands for the model at its full
depth and at any shape: layers of one kind run the same operators, and every size is an exact polynomial
in batch, sequence length and scored tokens.  Answering for a new shape is then arithmetic (allocated) or
a replay through the simulated allocator (reserved), not a trace.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from autosft.profiles.memory.allocator.caching_allocator import Block, CachingAllocator, Pool
from autosft.profiles.memory.program.blocks import Birth, Phase, Segment, Trace

#: trl's chunked head takes the scored tokens this many at a time (trl/kernels/chunked_logprob.py).
HEAD_CHUNK_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A micro batch: `batch` rows of `seq` tokens (padding included), `scored` tokens with a label.

    Where it is a row, its `batch` examples lie behind one another in one row of `seq` tokens in all.
    `chunk`: so many tokens at a time the model's state-space layers compute, 0 without such layers.
    """

    batch: int
    seq: int
    scored: int
    is_row: bool = False
    chunk: int = 0

    @property
    def num_predicted(self) -> int:
        """Positions that have a next token, whether or not it has a label."""
        return self.seq - 1 if self.is_row else self.batch * (self.seq - 1)


#: The monomials that sizes are made of.  Kernels round lengths up to 8, 32, 64 or 128 rows; the head
#: works on chunks of `HEAD_CHUNK_TOKENS` scored tokens, of which the last one has `tail` tokens; of a row all
#: positions but the last (bp) have a next token; state-space layers pad a row to c whole chunks of its own.
MONOMIALS = (
    "1", "b", "s", "bs", "bp", "ss", "bss", "n", "chunk", "tail", "bs8", "bss8", "ss8", "bs32", "bs64",
    "bs128", "bc", "bcc",
)  # fmt: skip


def features(shape: Shape) -> NDArray[np.float64]:
    """Return the monomials' values; exact in float64 up to 2**53."""
    b, s, n = shape.batch, shape.seq, shape.scored
    s8, s32, s64, s128 = (-(-s // k) * k for k in (8, 32, 64, 128))
    chunk = min(n, HEAD_CHUNK_TOKENS)
    tail = n - HEAD_CHUNK_TOKENS * (max(1, -(-n // HEAD_CHUNK_TOKENS)) - 1)
    c = -(-s // shape.chunk) if shape.chunk else 0
    values = (1, b, s, b * s, b * (s - 1), s * s, b * s * s, n, chunk, tail,
              b * s8, b * s * s8, s * s8, b * s32, b * s64, b * s128, b * c, b * c * c)  # fmt: skip
    return np.array(values, dtype=np.float64)


class NotPolynomial(Exception):  # noqa: N818
    """The traces do not run the same operators, or a size is no polynomial in the shape."""


class NotRepeated(NotPolynomial):
    """Layers keep something across one another, so that a few of them do not stand for all."""


def solve_sizes(sizes: Sequence[Sequence[int]], shapes: Sequence[Shape]) -> NDArray[np.float64]:
    """Return coefficients (block, monomial) that give every size at every shape, exactly.

    `sizes[i][j]` is block i at shape j.  A size is the sum of at most three monomials, and of two fewer than
    there are shapes, so that two of them always check the others; the fewest that explain all shapes are
    taken.  Raises NotPolynomial where none do.
    """
    table = np.array([features(shape) for shape in shapes])  # (shape, monomial)
    known: dict[tuple[int, ...], NDArray[np.float64]] = {}
    coefficients = np.zeros((len(sizes), len(MONOMIALS)))
    for row, values in enumerate(sizes):
        key = tuple(values)
        if key not in known:
            known[key] = _solve(np.array(values, dtype=np.float64), table)
        coefficients[row] = known[key]
    return coefficients


def _solve(values: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    solution = np.zeros(table.shape[1])
    if (values == values[0]).all():
        solution[0] = values[0]
        return solution
    for count in (1, 2, 3):
        if count > max(1, len(values) - 2):
            break
        for chosen in itertools.combinations(np.flatnonzero(table.any(axis=0)).tolist(), count):
            part = table[:, chosen]
            found = np.linalg.lstsq(part, values, rcond=None)[0]
            found = np.round(found * 2) / 2  # bytes per element: whole, or half for 4-bit weights
            if np.array_equal(part @ found, values):
                solution[list(chosen)] = found
                return solution
    raise NotPolynomial(f"no polynomial gives {values.astype(np.int64).tolist()}")


@dataclass(frozen=True, slots=True)
class CarryName:
    """A block that outlives its segment, so that a later segment can end it: a gradient, a kept output."""

    segment: str  # first word of the segment's name: variants of a segment carry the same blocks
    operator: str
    layer: int | None
    occurrence: int  # among those of equal segment, operator and layer


@dataclass(frozen=True, slots=True, eq=False)
class CompiledSegment:
    """One segment at full depth; two are the same only if they are one object.

    `events` are indices of local blocks (birth), their complement (death), or, from `len(births)` on,
    complements of indices into `ends` (death of a carried block).
    """

    name: str
    events: tuple[int, ...]
    phases: tuple[Phase, ...]
    coefficients: NDArray[np.float64]  # (local block, monomial)
    births: tuple[Birth, ...]  # sizes are those of the first traced shape
    survivors: tuple[tuple[int, CarryName], ...]
    ends: tuple[CarryName, ...]

    def sizes(self, at: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return rounded block sizes in bytes for the given monomials."""
        raw = np.rint(self.coefficients @ at).astype(np.int64)
        rounded: NDArray[np.int64] = np.maximum(raw + 511 & ~511, 512)
        return rounded

    def sizes_at(self, shape: Shape) -> list[int]:
        """Return rounded block sizes in bytes at a shape, for a replay."""
        sizes: list[int] = self.sizes(features(shape)).tolist()
        return sizes


@dataclass(frozen=True, slots=True)
class Program:
    """The segments of a step at full depth, by name; `untraced` names operators that were not followed."""

    segments: Mapping[str, CompiledSegment]
    untraced: tuple[str, ...] = ()

    def with_segments(self, other: Program) -> Program:
        """Return a program that has the segments of both."""
        return Program(
            {**self.segments, **other.segments}, tuple({**dict.fromkeys(self.untraced + other.untraced)})
        )


def compile_program(
    traces: Sequence[Trace], shapes: Sequence[Shape], *, layer_kinds: Sequence[int], depth: int
) -> Program:
    """Make a program for `len(layer_kinds)` layers from traces of `depth` layers.

    `layer_kinds[j]` says which traced layer stands for layer j: 0 for the first, `depth - 1` for the last,
    one in between for the others.  Of a segment that was traced several times the last one counts, when
    everything that a step leaves behind is there.  Raises NotPolynomial where the traces differ in more
    than sizes.
    """
    first = traces[0]
    for trace in traces[1:]:
        if not _same_operators(first, trace):
            raise NotPolynomial("the operators differ between shapes")
    sizes = list(zip(*([birth.size for birth in trace.births] for trace in traces), strict=True))
    coefficients = solve_sizes(sizes, shapes)
    extension = _Extension(first, coefficients, layer_kinds, depth)
    last = {segment.name: index for index, segment in enumerate(first.segments)}
    compiled = {name: extension.compile(index) for name, index in last.items()}
    return Program(compiled, first.untraced)


def _same_operators(one: Trace, other: Trace) -> bool:
    if len(one.births) != len(other.births) or len(one.segments) != len(other.segments):
        return False
    if any(a.operator != b.operator for a, b in zip(one.births, other.births, strict=True)):
        return False
    pairs = zip(one.segments, other.segments, strict=True)
    return all(a.events == b.events and a.tags == b.tags for a, b in pairs)


class _Extension:
    """Repeats the inner layers of a shallow trace."""

    def __init__(
        self, trace: Trace, coefficients: NDArray[np.float64], layer_kinds: Sequence[int], depth: int
    ) -> None:
        self.trace = trace
        self.coefficients = coefficients
        self.kinds = list(layer_kinds)
        self.depth = depth
        self.segment_of: dict[int, int] = {}
        self.tag_of: dict[int, int | None] = {}
        self.name_of: dict[int, tuple[object, ...]] = {}
        self.block_named: dict[tuple[object, ...], int] = {}
        self.carry: dict[int, CarryName] = {}
        # (segment, layer, -1 or 1) -> blocks of the layer that the one after or before it ends
        self.ended_next: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        ended: set[int] = set()
        for index, segment in enumerate(trace.segments):
            seen: dict[tuple[object, ...], int] = defaultdict(int)
            for event, tag in zip(segment.events, segment.tags, strict=True):
                if event < 0:
                    own = self.tag_of[~event]
                    if self.segment_of[~event] == index:
                        ended.add(~event)
                        if own is not None and tag is not None and abs(own - tag) == 1:
                            self.ended_next[index, own, own - tag].append(~event)
                    continue
                birth = trace.births[event]
                name = (index, birth.phase, birth.operator, coefficients[event].tobytes(), tag)
                self.segment_of[event], self.tag_of[event] = index, tag
                self.name_of[event] = (*name[:-1], seen[name])
                self.block_named[(*self.name_of[event], tag)] = event
                seen[name] += 1
        for segment in trace.segments:
            counts: dict[tuple[object, ...], int] = defaultdict(int)
            for event, tag in zip(segment.events, segment.tags, strict=True):
                if event >= 0 and event not in ended:
                    birth = trace.births[event]
                    base = segment.name.split()[0]
                    key = (birth.operator, tag)
                    self.carry[event] = CarryName(base, birth.operator, tag, counts[key])
                    counts[key] += 1

    def compile(self, index: int) -> CompiledSegment:
        segment = self.trace.segments[index]
        births: list[int] = []  # shallow block of each local block
        number: dict[tuple[int, int], int] = {}  # (shallow block, full layer or -1) -> local block
        ends: list[CarryName] = []
        events: list[tuple[int, CarryName | None]] = []
        phases: list[Phase] = []
        for start, stop, full_layer, is_last in self._runs(segment):
            for position in range(start, stop):
                event = segment.events[position]
                block = event if event >= 0 else ~event
                instance = self._instance(block, segment.tags[position], full_layer)
                if event < 0 and instance[1] < 0 and not is_last:
                    continue  # shared by the layers of this kind: it ends with the last of them
                if event >= 0:
                    number[instance] = len(births)
                    events.append((len(births), None))
                    births.append(block)
                elif self.segment_of[block] == index and instance in number:
                    events.append((~number[instance], None))
                elif block in self.carry:
                    events.append((0, self._carry_name(*instance)))
                else:
                    raise NotRepeated("a block ends before it is born")
                phases.append(segment.phases[position])
        deaths = [code for code, carried in events if carried is None and code < 0]
        if len(deaths) != len(set(deaths)):
            raise NotRepeated("a block that layers share ends in more than one of them")
        codes = []
        for code, carried in events:
            if carried is None:
                codes.append(code)
            else:
                codes.append(~(len(births) + len(ends)))
                ends.append(carried)
        survivors = tuple(
            (local, self._carry_name(block, layer))
            for (block, layer), local in number.items()
            if block in self.carry
        )
        return CompiledSegment(
            name=segment.name,
            events=tuple(codes),
            phases=tuple(phases),
            coefficients=self.coefficients[births],
            births=tuple(self.trace.births[block] for block in births),
            survivors=survivors,
            ends=tuple(ends),
        )

    def _runs(self, segment: Segment) -> list[tuple[int, int, int | None, bool]]:
        """Return stretches of events as (start, stop, full layer, last of its kind), at full depth."""
        runs = []
        start = 0
        for tag, group in itertools.groupby(segment.tags):
            stop = start + len(list(group))
            runs.append((start, stop, tag))
            start = stop
        result: list[tuple[int, int, int | None, bool]] = []
        position = 0
        while position < len(runs):
            tag = runs[position][2]
            if tag is None:
                result.append((*runs[position], True))
                position += 1
                continue
            stop, step = position + 1, 0
            while stop < len(runs) and (after := runs[stop][2]) is not None:
                before = runs[stop - 1][2]
                assert before is not None
                if abs(after - before) != 1 or (step and after - before != step):
                    break
                step = after - before
                stop += 1
            by_kind = {runs[i][2]: runs[i] for i in range(position, stop)}
            layers = [j for j, kind in enumerate(self.kinds) if kind in by_kind]
            if step < 0:
                layers.reverse()
            last = {self.kinds[j]: j for j in layers}
            for j in layers:
                first, end, _ = by_kind[self.kinds[j]]
                result.append((first, end, j, last[self.kinds[j]] == j))
            position = stop
        return result

    def _instance(self, block: int, tag: int | None, full_layer: int | None) -> tuple[int, int]:
        """Return which block, of which full layer (-1: none), an event in layer `full_layer` means."""
        own = self.tag_of[block]
        if own is None:
            return block, -1
        if tag is None or full_layer is None:
            # Outside of layers: the first and the last layer have a block of their own.
            return block, self._only_layer(own)
        if own == tag:
            return block, full_layer
        if abs(own - tag) != 1 and self.kinds.count(own) == 1 and self.kinds.count(tag) == 1:
            return block, self.kinds.index(own)
        layer = full_layer + (own - tag)
        if not 0 <= layer < len(self.kinds):
            raise NotRepeated("a layer ends a block of a layer that is not there")
        kind = self.kinds[layer]
        other = block if kind == own else self._counterpart(block, kind, own - tag)
        if other is None:
            other = self.block_named.get((*self.name_of[block], kind))
        if other is None:
            raise NotRepeated("neighbouring layers differ in what they keep")
        return other, layer

    def _counterpart(self, block: int, kind: int, step: int) -> int | None:
        """Return the block of a layer of another kind that its neighbour ends in the place of `block`.

        Layers hand the same tensors on (the residual stream, its gradient), and optimizers leave theirs
        behind, whatever a layer is made of: as many blocks of the same operators in the same order.
        """
        segment, own = self.segment_of[block], self.tag_of[block]
        assert own is not None, "a layer's block"
        ours, theirs = (self.ended_next[segment, tag, step] for tag in (own, kind))
        if [self._maker(block) for block in ours] != [self._maker(block) for block in theirs]:
            return None
        return theirs[ours.index(block)]

    def _maker(self, block: int) -> tuple[str, Phase]:
        birth = self.trace.births[block]
        return birth.operator, birth.phase

    def _only_layer(self, kind: int) -> int:
        layers = [j for j, other in enumerate(self.kinds) if other == kind]
        if len(layers) != 1:
            raise NotRepeated("a block of an inner layer ends outside of the layers")
        return layers[0]

    def _carry_name(self, block: int, full_layer: int) -> CarryName:
        carry = self.carry[block]
        layer = None if full_layer < 0 else full_layer
        return CarryName(carry.segment, carry.operator, layer, carry.occurrence)


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
