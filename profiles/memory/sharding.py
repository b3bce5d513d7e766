"""Model what several devices change: DDP's buckets and FSDP2's shards.

Computed from the traced blocks, not by tracing collectives.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping

from autosft.profiles.memory.program.blocks import Owner
from autosft.profiles.memory.program.program import CompiledSegment, Program, Shape, features
from autosft.profiles.memory.program.run import Beside
from autosft.profiles.recipe import Sharding, StepRecipe

#: DDP's default bucket_cap_mb.
BUCKET_BYTES = 25 << 20


def sharded(program: Program, recipe: StepRecipe) -> Beside:
    """Return what one of several devices holds in addition to the traced step, and the number of shards.

    DDP holds a second copy of the gradients, in buckets.  FSDP2 keeps 1/n of parameters, gradients and
    optimizer state, and of the optimizer's temporaries (foreach's copies).  While the model runs, two layers
    are unsharded at a time (the current one and the prefetched one), as are all parameters outside the layers
    and the gradients of one layer, before and after their reduction in fp32.
    """
    if recipe.sharding is Sharding.NONE or recipe.data_parallel == 1:
        return Beside()
    gradients = bytes_by_layer(program, "micro", Owner.GRADIENT)
    if recipe.sharding is Sharding.DDP:
        total = sum(gradients.values())
        sizes = [BUCKET_BYTES] * (total // BUCKET_BYTES) + [total % BUCKET_BYTES]
        return Beside(kept=tuple((Owner.GRADIENT, size) for size in sizes if size))
    parameters = bytes_by_layer(program, "setup", Owner.PARAMETER)
    layers = sorted((size for layer, size in parameters.items() if layer is not None), reverse=True)
    largest = max((size for layer, size in gradients.items() if layer is not None), default=0)
    passing = [(Owner.PARAMETER, size) for size in (*layers[:2], parameters.get(None, 0))]
    passing += [(Owner.GRADIENT, size) for size in (largest, largest, gradients.get(None, 0))]
    return Beside(passing=tuple(entry for entry in passing if entry[1]), num_shards=recipe.data_parallel)


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
