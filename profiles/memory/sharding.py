"""What several devices change: DDP's buckets, FSDP2's shards, communication buffers.

By arithmetic over the traced blocks, not by a trace of collectives.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from autosft.profiles.memory.blocks import Owner
from autosft.profiles.memory.program import Program, Shape, features
from autosft.profiles.recipe import Sharding, StepRecipe

#: NCCL's buffers per process group: 544-688 MB were measured on eight GPUs (docs/memory.md).
NCCL_BYTES = 640 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """Bytes that sharding adds to (negative: takes from) what one device needs, by owner, and outside."""

    by_owner: dict[Owner, int]
    outside_bytes: int

    @property
    def allocated_bytes(self) -> int:
        return sum(self.by_owner.values())


def sharded(program: Program, recipe: StepRecipe) -> Sharded:
    """Return the difference to one device.

    DDP holds gradients a second time, in its buckets.  FSDP2 keeps 1/n of parameters, gradients and
    optimizer state; in addition two layers are whole at a time (the one that runs and the one that is
    fetched ahead), everything outside the layers is whole during the step, and the gradients of one layer
    and of what is outside are whole before they are reduced in fp32.
    """
    if recipe.sharding is Sharding.NONE or recipe.data_parallel == 1:
        return Sharded(by_owner={}, outside_bytes=0)
    parameters = _bytes_by_layer(program, "setup", Owner.PARAMETER)
    gradients = _bytes_by_layer(program, "micro", Owner.GRADIENT)
    if recipe.sharding is Sharding.DDP:
        return Sharded(by_owner={Owner.GRADIENT: sum(gradients.values())}, outside_bytes=NCCL_BYTES)
    state = sum(_bytes_by_layer(program, "update first", Owner.OPTIMIZER_STATE).values())
    share = 1 - 1 / recipe.data_parallel
    layers = sorted((size for layer, size in parameters.items() if layer is not None), reverse=True)
    grads = max((size for layer, size in gradients.items() if layer is not None), default=0)
    whole = sum(layers[:2]) + parameters.get(None, 0)
    return Sharded(
        by_owner={
            Owner.PARAMETER: int(whole - share * sum(parameters.values())),
            Owner.GRADIENT: int(2 * grads + gradients.get(None, 0) - share * sum(gradients.values())),
            Owner.OPTIMIZER_STATE: int(-share * state),
        },
        outside_bytes=NCCL_BYTES,
    )


def _bytes_by_layer(program: Program, segment: str, owner: Owner) -> dict[int | None, int]:
    compiled = program.segments[segment]
    sizes = compiled.sizes(features(Shape(batch=1, seq=2, scored=1)))
    totals: dict[int | None, int] = defaultdict(int)
    for local, name in compiled.survivors:
        if compiled.births[local].owner is owner:
            totals[name.layer] += int(sizes[local])
    return dict(totals)
