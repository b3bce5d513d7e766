"""The elements of a trace: memory blocks with their births (allocation) and deaths (release)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Operators whose blocks are allocated in a stream of their own, by which others do not reuse them.
ALL_GATHER, REDUCE_SCATTER = "fsdp::all_gather", "fsdp::reduce_scatter"
STREAMS = {ALL_GATHER: 1, REDUCE_SCATTER: 2}


class Owner(enum.Enum):
    """What a block's memory is used for."""

    PARAMETER = "parameters"
    GRADIENT = "gradients"
    OPTIMIZER_STATE = "optimizer state"
    ACTIVATION = "activations"
    LOGITS = "logits and loss"
    INPUT = "inputs"
    WORKSPACE = "workspace"


class Phase(enum.Enum):
    """The phase of a step."""

    SETUP = "setup"
    INPUT = "input"
    FORWARD = "forward"
    HEAD = "head"
    LOSS_BACKWARD = "loss backward"
    LAYER_BACKWARD = "layer backward"
    OPTIMIZER = "optimizer"
    EVALUATION = "evaluation"
    GENERATION = "generation"


@dataclass(frozen=True, slots=True)
class Birth:
    """The allocation of a storage: its bytes, and the operator, phase, layer and owner that it belongs to."""

    size: int
    operator: str
    phase: Phase
    layer: int | None
    owner: Owner


@dataclass(slots=True)
class Segment:
    """A part of a run that can be repeated: a micro step, an optimizer step.

    `events` are block numbers: n for a birth, ~n for a death; `tags` are the events' layers (None outside the
    layers), `phases` their phases.
    """

    name: str
    events: list[int] = field(default_factory=list)
    tags: list[int | None] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trace:
    """The events of one run on meta tensors, in order.  Births are numbered over all segments.

    `only_at_its_shape`: sizes are step functions of the shape, so that the trace holds for no other shape.
    """

    births: tuple[Birth, ...]
    segments: tuple[Segment, ...]
    untraced: tuple[str, ...]
    only_at_its_shape: bool = False

    def with_one_step(self) -> Trace | None:
        """Return the trace without the micro batches of its second optimizer step.

        None where they differ from those of the first: something is made once and kept.
        """
        names = [segment.name for segment in self.segments]
        if "update first" not in names or "update" not in names or "micro" not in names:
            return None
        first, update = names.index("micro"), names.index("update first")
        second, num = update + 1, update - first
        if names[second : second + num + 1] != [*names[first:update], "update"]:
            return None
        before, after = self.segments[first:update], self.segments[second : second + num]
        start, again = (
            min((block for s in part for block in s.events if block >= 0), default=0)
            for part in (before, after)
        )
        count, count_again = (sum(event >= 0 for s in part for event in s.events) for part in (before, after))
        if count != count_again or self.births[start : start + count] != self.births[again : again + count]:
            return None

        def renumbered(event: int) -> int:
            block = event if event >= 0 else ~event
            if block >= again + count:
                block -= count
            elif block >= again:
                block += start - again
            return block if event >= 0 else ~block

        def moved(segment: Segment) -> Segment:
            return Segment(segment.name, [*map(renumbered, segment.events)], segment.tags, segment.phases)

        if [moved(segment) for segment in after] != list(before):
            return None
        return Trace(
            self.births[:again] + self.births[again + count :],
            (*self.segments[:second], *map(moved, self.segments[second + num :])),
            self.untraced,
            self.only_at_its_shape,
        )

    def peak_bytes(self) -> int:
        """Return the largest sum of live storages in bytes, without rounding."""
        current = peak = 0
        for segment in self.segments:
            for event in segment.events:
                current += self.births[event].size if event >= 0 else -self.births[~event].size
                peak = max(peak, current)
        return peak


def unique_rows(table: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """Return the different rows in order of appearance, and where each row is among them.

    As np.unique(axis=0, return_inverse=True), which sorts rows field by field: 20 times as slow.
    """
    number: dict[bytes, int] = {}
    first: list[int] = []
    of_row = np.zeros(len(table), np.intp)
    for row, content in enumerate(map(bytes, np.ascontiguousarray(table))):
        of_row[row] = number.setdefault(content, len(first))
        if of_row[row] == len(first):
            first.append(row)
    return table[first], of_row
