"""The elements of a trace: memory blocks with their births (allocation) and deaths (release)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


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

    def peak_bytes(self) -> int:
        """Return the largest sum of live storages in bytes, without rounding."""
        current = peak = 0
        for segment in self.segments:
            for event in segment.events:
                current += self.births[event].size if event >= 0 else -self.births[~event].size
                peak = max(peak, current)
        return peak
