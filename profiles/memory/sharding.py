"""What several devices hold in addition to the traced step.

FSDP2 is traced as one rank runs it (`trace.fsdp`).  Added here are DDP's buckets, the weights that a sharded
model gathers to answer prompts, and all of FSDP2 where a user's trainer is traced, which runs on whole
weights.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from autosft.profiles.memory.program.blocks import Owner
from autosft.profiles.memory.program.program import CompiledSegment, Program, Shape, features
from autosft.profiles.memory.program.run import Beside
from autosft.profiles.recipe import Sharding, StepRecipe

#: DDP's buckets (torch/nn/parallel/distributed.py): the first one's size, and bucket_cap_mb of the others.
FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20
#: DDP sends rank 0's weights in buckets of this size, two at a time (broadcast_coalesced in reducer.cpp).
BROADCAST_BUCKET_BYTES = 250 << 20
BROADCASTS_IN_FLIGHT = 2


def sharded(program: Program, recipe: StepRecipe) -> Beside:
    """Return what one of several devices holds in addition to the traced step, and the number of shards.

    DDP copies gradients into buckets, and flattens weights when it is built to send them.  FSDP2 keeps 1/n of
    parameters, gradients and optimizer state, and of the optimizer's temporaries (foreach's copies).  While
    the model runs, two layers are unsharded at a time (the current one and the prefetched one), as are all
    parameters outside the layers and the gradients of one layer, before and after their reduction in fp32.
    """
    if recipe.sharding is Sharding.NONE or recipe.data_parallel == 1:
        return Beside()
    if recipe.sharding is Sharding.DDP:
        weights = _sizes(program.segments["setup"], Owner.PARAMETER)
        sent = coalesced(weights, (BROADCAST_BUCKET_BYTES,))
        flat = sorted((sum(bucket) for bucket in sent if len(bucket) > 1), reverse=True)
        gradients = _sizes(program.segments["micro"], Owner.GRADIENT)
        buckets = coalesced(gradients, (FIRST_BUCKET_BYTES, BUCKET_BYTES))
        return Beside(
            building=tuple((Owner.PARAMETER, size) for size in flat[:BROADCASTS_IN_FLIGHT]),
            kept=tuple((Owner.GRADIENT, sum(bucket)) for bucket in buckets),
        )
    parameters = bytes_by_layer(program, "setup", Owner.PARAMETER)
    layers = sorted((size for layer, size in parameters.items() if layer is not None), reverse=True)
    whole = [*layers[:2], parameters.get(None, 0)]
    if recipe.traces_shards:
        gathered = [size * recipe.data_parallel for size in whole]
        return Beside(generating=tuple((Owner.PARAMETER, size) for size in gathered if size))
    gradients_of = bytes_by_layer(program, "micro", Owner.GRADIENT)
    largest = max((size for layer, size in gradients_of.items() if layer is not None), default=0)
    passing = [(Owner.PARAMETER, size) for size in whole]
    passing += [(Owner.GRADIENT, size) for size in (largest, largest, gradients_of.get(None, 0))]
    return Beside(passing=tuple(entry for entry in passing if entry[1]), num_shards=recipe.data_parallel)


def coalesced(sizes: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
    """Put tensors into buckets in order; one is full when it reaches its limit.

    As `compute_bucket_assignment_by_size` in reducer.cpp does; the last of `limits` holds for all further
    buckets.
    """
    buckets: list[list[int]] = []
    is_full = True
    for size in sizes:
        if is_full:
            buckets.append([])
        buckets[-1].append(size)
        is_full = sum(buckets[-1]) >= limits[min(len(buckets), len(limits)) - 1]
    return buckets


def bytes_by_layer(program: Program, segment: str, owner: Owner) -> Mapping[int | None, int]:
    """Return the bytes of an owner's blocks that survive a segment, by layer (None: outside the layers)."""
    return _bytes_by_layer(program.segments[segment], owner)


@functools.lru_cache(maxsize=256)
def _bytes_by_layer(compiled: CompiledSegment, owner: Owner) -> Mapping[int | None, int]:
    sizes = compiled.sizes(features(Shape(batch=1, seq=2, scored=1)))
    totals: dict[int | None, int] = defaultdict(int)
    for local, name in compiled.survivors:
        if compiled.births[local].owner is owner:
            totals[name.layer] += int(sizes[local])
    return dict(totals)


@functools.lru_cache(maxsize=256)
def _sizes(compiled: CompiledSegment, owner: Owner) -> tuple[int, ...]:
    """Return the bytes of an owner's blocks that survive a segment, in the order in which they are born."""
    sizes = compiled.sizes(features(Shape(batch=1, seq=2, scored=1)))
    survivors = sorted(local for local, _ in compiled.survivors if compiled.births[local].owner is owner)
    return tuple(int(sizes[local]) for local in survivors)
