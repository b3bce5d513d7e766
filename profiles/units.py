"""Bytes in words."""

from __future__ import annotations

GIB = 1 << 30


def gib(num_bytes: float) -> str:
    """Write bytes for people: MiB below 1 GiB, else GiB with one decimal."""
    if abs(num_bytes) < GIB:
        return f"{num_bytes / (1 << 20):.0f} MiB"
    return f"{num_bytes / GIB:.1f} GiB"
