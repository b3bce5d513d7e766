"""The settings of CUDA's caching allocator, made before CUDA starts and asked for again afterwards."""

from __future__ import annotations

import os
import sys
from typing import Any

#: Segments that grow instead of being replaced: what one of them has lost to fragments another need not hold.
SETTINGS = "expandable_segments:True"

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_allocator() -> None:
    """Let the allocator grow its segments, where the system can and the user has not chosen otherwise.

    To be called before the first allocation.  Through torch and not the environment, which was read when the
    warm server imported it.  Windows and WSL cannot map memory that way.
    """
    import torch

    if can_expand() and not any(name in os.environ for name in _VARIABLES):
        torch._C._accelerator_setAllocatorSettings(SETTINGS)


def can_expand() -> bool:
    return sys.platform == "linux" and "microsoft" not in os.uname().release.lower()


def why_not_set() -> str:
    """Say what the allocator does otherwise than it was told, after an allocation; empty when nothing."""
    import torch

    told = torch._C._accelerator_getAllocatorSettings()
    if SETTINGS not in told or any(one.get("is_expandable") for one in _segments()):
        return ""
    return f"The allocator was told {told!r}, but its segments do not expand: the driver may be too old."


def _segments() -> list[dict[str, Any]]:
    import torch

    segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
    return segments
