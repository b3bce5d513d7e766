"""An execution plan and a memory estimate for tests that need one and do not care which."""

from __future__ import annotations

import dataclasses
from typing import Any

from autosft.profiles.recipe import ByteRange, Checkpointing, MemoryEstimate, Sharding
from autosft.studies.trial import ExecutionPlan

GIB = 2**30


def memory_estimate(**changes: Any) -> MemoryEstimate:
    """Needs 2 GiB, at most 3, and 1 that the allocator does not see."""
    made = MemoryEstimate(
        allocated=ByteRange(median_bytes=2 * GIB, upper_bytes=3 * GIB),
        need=ByteRange(median_bytes=2 * GIB, upper_bytes=3 * GIB),
        uncapped=ByteRange(median_bytes=3 * GIB, upper_bytes=4 * GIB),
        outside_bytes=GIB,
        components=(("parameters", GIB), ("activations", GIB)),
        peak_phase="layer backward",
        peak_owner="activations",
        method="closed form",
        bound_level=0.95,
        num_calibration_rows=0,
        untraced=(),
    )
    return dataclasses.replace(made, **changes)


def execution_plan(*, micro_batch: int = 4, effective_batch_size: int = 32, **changes: Any) -> ExecutionPlan:
    """One device, no checkpointing, one CPU thread."""
    made = ExecutionPlan(
        device_name="test device",
        micro_batch=micro_batch,
        gradient_accumulation=effective_batch_size // micro_batch,
        data_parallel=1,
        checkpointing=Checkpointing.OFF,
        sharding=Sharding.NONE,
        num_threads=1,
        memory_cap_bytes=3 * GIB,
        estimate=memory_estimate(),
        predicted_tokens_per_s=1e4,
        predicted_duration_s=60.0,
        reason="the largest that fits",
    )
    return dataclasses.replace(made, **changes)
