"""Ways to hold what full fine-tuning trains: how many bits weights and moments have, and what that costs.

A way changes numerics, so that it is pinned once per study (`--memory`) and never chosen silently.  What it
does to the loss is measured, not assumed: `benchmarks/lean_losses.py` writes profiles/data/memory_ways.json.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from autosft.profiles.errors import UserError
from autosft.profiles.optimizers import OPTIMIZERS
from autosft.profiles.recipe import Method, Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryWay:
    """How a fully trained model is held; None: as the study would without a way."""

    name: str  # of --memory
    summary: str
    precision: Precision | None = None
    optimizer: str | None = None

    @property
    def bytes_per_weight(self) -> float | None:
        """Weight, gradient and moments of a weight of a large matrix; None where that is not fixed."""
        if self.precision is None or self.optimizer is None:
            return None
        state = OPTIMIZERS[self.optimizer].state
        assert state is not None, "a way's optimizer is a proven one"
        return 2 * self.precision.weight_bytes + state.bytes_per_weight(self.precision.weight_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossExcess:
    """How far runs end above fp32's at the same settings, as a share of its loss; negative: below."""

    excess: float  # the mean over tasks, seeds and rates
    half_width: float  # of its 95 % interval
    worst_rate_excess: float  # the mean at the rate where it is largest
    num_runs: int


EXACT = MemoryWay(name="exact", summary="the study's precision and optimizer")
#: From the most memory to the least.
WAYS = {
    way.name: way
    for way in (
        EXACT,
        MemoryWay(
            name="lean",
            summary="bf16 weights, rounded stochastically, and 8-bit moments",
            precision=Precision.BF16_STOCHASTIC,
            optimizer="adamw_torch_8bit",
        ),
        MemoryWay(
            name="leanest",
            summary="the same with 4-bit moments",
            precision=Precision.BF16_STOCHASTIC,
            optimizer="adamw_torch_4bit",
        ),
    )
}
LEAN_WAYS = tuple(way for way in WAYS.values() if way is not EXACT)
#: `--memory auto`: the first way that fits.
AUTO = "auto"
#: Methods that train the weights themselves; adapters are small and fp32 whatever they stand on.
METHODS = (Method.FULL, Method.SPARSE)


@functools.cache
def _measured() -> Mapping[str, LossExcess]:
    names = LossExcess.__dataclass_fields__
    stored = json.loads((files("autosft.profiles.data") / "memory_ways.json").read_text(encoding="utf-8"))
    return {
        name: LossExcess(**{key: value for key, value in fields.items() if key in names})
        for name, fields in stored.items()
    }


def measured_loss(way: MemoryWay) -> LossExcess | None:
    """Return what a way was measured to do to the loss; None for the way that others are compared with."""
    return _measured().get(way.name)


def loss_in_words(way: MemoryWay) -> str:
    """Say what a way was measured to do to the loss of small models."""
    found = measured_loss(way)
    if found is None:
        return "none"
    return (
        f"measured: loss {found.excess:+.1%} ± {found.half_width:.1%} of fp32's, "
        f"{found.worst_rate_excess:+.1%} at the worst rate ({found.num_runs} runs of a small model)"
    )


def require_way(memory: str, method: str, precision: str, *, has_optimizer: bool) -> None:
    """Raise UserError where a lean way is asked for together with what it decides, or has nothing to do."""
    if memory == EXACT.name:
        return
    if method not in (AUTO, *(one.value for one in METHODS)):
        raise UserError(
            f"--memory {memory} --method {method}: it is about training all weights, and adapters are small.",
            remedy="Leave --memory out, or use --method full.",
        )
    given = f"--precision {precision}" if precision != "auto" else "--optimizer" if has_optimizer else ""
    if given:
        raise UserError(
            f"--memory {memory} and {given}: both decide how weights and moments are held.",
            remedy="Leave one of them out.",
        )


def ways_of(memory: str) -> tuple[MemoryWay, ...]:
    """Return the ways that a value of `--memory` permits, in the order in which they are tried."""
    return tuple(WAYS.values()) if memory == AUTO else (WAYS[memory],)
