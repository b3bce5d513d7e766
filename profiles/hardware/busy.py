"""Detect whether other programs use this machine's processor, which makes predicted times too short."""

from __future__ import annotations

import os

#: The share of cores that others may keep busy without a warning.
SHARE_IN_USE = 0.3


def load_now() -> float | None:
    """Return the load average over the last minute; None if it is not known."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not on Windows
        return None


def describe_load(load: float | None, num_cores: int) -> str:
    """Return a warning about other load on the processor; "" if there is none or it is not known."""
    if load is None or num_cores < 1 or load < SHARE_IN_USE * num_cores:
        return ""
    cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
    words = f"the processor is busy: {load:.1f} programs at work on {cores} over the last minute"
    slower = (load + num_cores) / num_cores
    return f"{words}, so that trials on it may take up to {slower:.1f} times as long as predicted"
