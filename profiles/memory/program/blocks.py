"""What a trace of a step consists of: blocks of memory that are born and die."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Owner(enum.Enum):
    """Whose memory a block is."""

    PARAMETER = "parameters"
    GRADIENT = "gradients"
    OPTIMIZER_STATE = "optimizer state"
    ACTIVATION = "activations"
    LOGITS = "logits and loss"
    INPUT = "inputs"
    WORKSPACE = "workspace"


class Phase(enum.Enum):
    """What the step is doing."""

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
    """A storage: how many bytes, which operator made it, when, for which layer and whom."""

    size: int
    operator: str
    phase: Phase
    layer: int | None
    owner: Owner


@dataclass(slots=True)
class Segment:
    """A stretch of the run that can be repeated on its own: a micro step, an optimizer step.

    `events` are block numbers: n for a birth, ~n for a death; `tags` the layer that each belongs to (None
    outside of layers) and `phases` what the step was doing.
    """

    name: str
    events: list[int] = field(default_factory=list)
    tags: list[int | None] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trace:
    """What one run on meta tensors did, in order.  Births are numbered over all segments.

    `only_at_its_shape`: sizes go in steps, so that it says nothing about other shapes.
    """

    births: tuple[Birth, ...]
    segments: tuple[Segment, ...]
    untraced: tuple[str, ...]
    only_at_its_shape: bool = False

    def peak_bytes(self) -> int:
        """Return the largest sum of live storages, without any rounding."""
        current = peak = 0
        for segment in self.segments:
            for event in segment.events:
                current += self.births[event].size if event >= 0 else -self.births[~event].size
                peak = max(peak, current)
        return peak
