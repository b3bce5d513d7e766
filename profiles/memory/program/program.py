"""Represent a step as a program: births and deaths of blocks, sized by polynomials in the batch's shape.

A program is compiled from traces of a shallow model at a few shapes, and describes the model at full depth
and at any shape: layers of one kind run the same operators, and every size is an exact polynomial in batch,
sequence length and scored tokens.  A new shape then costs arithmetic (allocated) or a replay through the
simulated allocator (reserved), not a trace.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autosft.profiles.memory.program.blocks import Birth, Phase, Segment, Trace

#: trl's chunked head processes this many scored tokens at a time (trl/kernels/chunked_logprob.py).
HEAD_CHUNK_TOKENS = 4096
#: The largest vocabulary of a head in one pass (`trace.one_pass_head`), whose two tiles hold all of it: they
#: take no more than trl's, which are half as wide and more.
ONE_PASS_VOCABULARY = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A micro batch: `batch` rows of `seq` tokens (padding included), `scored` tokens with a label.

    With `is_row`, its `batch` examples are packed into one row of `seq` tokens in total.  `chunk` is the
    number of tokens that the model's state-space layers process at a time, 0 without such layers.
    """

    batch: int
    seq: int
    scored: int
    is_row: bool = False
    chunk: int = 0

    @property
    def num_predicted(self) -> int:
        """The number of positions that have a next token, with or without a label."""
        return self.seq - 1 if self.is_row else self.batch * (self.seq - 1)


#: The monomials of size polynomials.  Kernels round lengths up to 8, 32, 64 or 128 rows; the head processes
#: chunks of `HEAD_CHUNK_TOKENS` scored tokens, the last of which has `tail` tokens; all positions of a row
#: but the last (bp) have a next token; state-space layers pad a row to c whole chunks.
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
    """The traces do not run the same operators, or a size is not a polynomial in the shape."""


class NotRepeated(NotPolynomial):
    """Layers share blocks, so that a few of them do not represent all."""


def solve_sizes(sizes: Sequence[Sequence[int]], shapes: Sequence[Shape]) -> NDArray[np.float64]:
    """Return coefficients (block, monomial) that reproduce every size at every shape exactly.

    `sizes[i][j]` is block i at shape j.  A size is a combination of at most three monomials, and of at least
    two fewer than there are shapes, so that two shapes always check the others; the fewest that fit all
    shapes are used.  Raises NotPolynomial where none do.
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
            found = np.round(found * 2) / 2  # bytes per element: whole numbers, or halves for 4-bit weights
            if np.array_equal(part @ found, values):
                solution[list(chosen)] = found
                return solution
    raise NotPolynomial(f"no polynomial gives {values.astype(np.int64).tolist()}")


@dataclass(frozen=True, slots=True)
class CarryName:
    """The name of a block that outlives its segment and ends in a later one: a gradient, a kept output."""

    segment: str  # first word of the segment's name: its variants carry the same blocks
    operator: str
    layer: int | None
    occurrence: int  # index among those with the same segment, operator and layer


@dataclass(frozen=True, slots=True, eq=False)
class CompiledSegment:
    """One segment at full depth; compared by identity.

    `events` are indices of local blocks (birth), their complements (death), or, from `len(births)` on,
    complements of indices into `ends` (death of a carried block).
    """

    name: str
    events: tuple[int, ...]
    phases: tuple[Phase, ...]
    coefficients: NDArray[np.float64]  # (local block, monomial)
    births: tuple[Birth, ...]  # with the sizes at the first traced shape
    survivors: tuple[tuple[int, CarryName], ...]
    ends: tuple[CarryName, ...]

    def sizes(self, at: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return rounded block sizes in bytes for the given values of the monomials."""
        raw = np.rint(self.coefficients @ at).astype(np.int64)
        rounded: NDArray[np.int64] = np.maximum(raw + 511 & ~511, 512)
        return rounded

    def sizes_at(self, shape: Shape) -> list[int]:
        """Return rounded block sizes in bytes at a shape, for a replay."""
        sizes: list[int] = self.sizes(features(shape)).tolist()
        return sizes


@dataclass(frozen=True, slots=True)
class Program:
    """The segments of a step at full depth, by name; `untraced` names operators that could not be traced."""

    segments: Mapping[str, CompiledSegment]
    untraced: tuple[str, ...] = ()

    def with_segments(self, other: Program) -> Program:
        """Return a program with the segments of both."""
        return Program(
            {**self.segments, **other.segments}, tuple({**dict.fromkeys(self.untraced + other.untraced)})
        )


def compile_program(
    traces: Sequence[Trace], shapes: Sequence[Shape], *, layer_kinds: Sequence[int], depth: int
) -> Program:
    """Compile a program of `len(layer_kinds)` layers from traces of `depth` layers.

    `layer_kinds[j]` is the traced layer that represents layer j: 0 for the first, `depth - 1` for the last,
    one in between for the others.  Of a segment that was traced several times the last one is used, when all
    blocks that steps leave behind exist.  Raises NotPolynomial where the traces differ in more than sizes.
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
        # (segment, layer, -1 or 1) -> blocks of the layer that the layer after or before it ends
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
                    continue  # shared by all layers of this kind: ends with the last of them
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
        """Return runs of events as (start, stop, full layer, last of its kind), at full depth."""
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
        """Return the block, and its full layer (-1: none), that an event in layer `full_layer` refers to."""
        own = self.tag_of[block]
        if own is None:
            return block, -1
        if tag is None or full_layer is None:
            # Outside the layers, the first and the last layer have blocks of their own.
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
        """Return the block of a layer of another kind that its neighbour ends in place of `block`.

        Whatever a layer consists of, layers pass the same tensors on (the residual stream, its gradient) and
        optimizers leave the same ones behind: as many blocks of the same operators in the same order.
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
