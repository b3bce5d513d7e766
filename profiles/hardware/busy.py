"""Whether other programs use this machine's processor now, which makes every prediction of time too short."""

from __future__ import annotations

import os

#: Cores that others may keep busy before it is said, as a share of those there.
SHARE_IN_USE = 0.3


def load_now() -> float | None:
    """Return how many programs want a core, on average over the last minute; None where that is not known."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has none
        return None


def busy_words(load: float | None, num_cores: int) -> str:
    """Say how busy the processor is with other work; empty where it is not, or that is not known."""
    if load is None or num_cores < 1 or load < SHARE_IN_USE * num_cores:
        return ""
    cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
    words = f"the processor is busy: {load:.1f} programs at work on {cores} over the last minute"
    slower = (load + num_cores) / num_cores
    return f"{words}, so that trials on it may take up to {slower:.1f} times as long as predicted"
