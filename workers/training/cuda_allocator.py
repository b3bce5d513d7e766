"""The settings of CUDA's caching allocator, made before CUDA starts and asked for again afterwards."""

from __future__ import annotations

import os
from typing import Any

from autosft.profiles.memory.allocator.trial_settings import SETTINGS, can_expand, is_chosen


def set_allocator() -> None:
    """Let the allocator grow its segments, where the system can and the user has not chosen otherwise.

    To be called before the first allocation.  Through torch and not the environment, which was read when the
    warm server imported it.
    """
    import torch

    if can_expand() and not is_chosen(os.environ):
        torch._C._accelerator_setAllocatorSettings(SETTINGS)


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
