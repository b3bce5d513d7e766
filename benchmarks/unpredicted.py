"""A memory estimate for trials that run without one: nothing is claimed but the most they may take."""

from __future__ import annotations

from autosft.profiles.recipe import ByteRange, MemoryEstimate


def unpredicted_memory(*, upper_bytes: int) -> MemoryEstimate:
    """Return an estimate of 0 bytes, and of `upper_bytes` at most."""
    unknown = ByteRange(median_bytes=0, upper_bytes=upper_bytes)
    return MemoryEstimate(
        allocated=unknown,
        need=unknown,
        uncapped=unknown,
        outside_bytes=0,
        components=(),
        peak_phase="",
        peak_owner="",
        method="none",
        bound_level=0.0,
        num_calibration_rows=0,
        untraced=(),
    )
