"""Format bytes and durations for people."""

from __future__ import annotations

GIB = 1 << 30


def gib(num_bytes: float) -> str:
    """Format bytes: MiB below 1 GiB, else GiB with one decimal."""
    if abs(num_bytes) < GIB:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / GIB:.1f} GiB"


def duration(seconds: float) -> str:
    """Format a duration: 45 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    if seconds < 172_800:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86_400:.1f} days"
