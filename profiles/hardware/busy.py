"""Detect what makes predicted times too short: other programs at work, a GPU that slows itself down."""

from __future__ import annotations

import os
from collections.abc import Sequence

from autosft.profiles.hardware.device import DeviceProfile

#: The share of cores that others may keep busy without a warning.
SHARE_IN_USE = 0.3
#: Usual for a GPU at work: it is as fast as its power limit lets it be.
USUAL_REASONS = {"power limit"}


def load_now() -> float | None:
    """Return the load average over the last minute; None if it is not known."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not on Windows
        return None


def num_free_cores(load: float | None, num_cores: int) -> int:
    """Return the cores that others leave, at least one, for work that has no share of them by a plan.

    More threads than that wait for each other at every operator: with eight programs at work on two cores,
    two threads multiplied small matrices 1.4 to 2 times slower than one (torch 2.13).
    """
    return max(1, num_cores - round(load or 0.0))


def describe_load(load: float | None, num_cores: int) -> str:
    """Return a warning about other load on the processor; "" if there is none or it is not known."""
    if load is None or num_cores < 1 or load < SHARE_IN_USE * num_cores:
        return ""
    cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
    words = f"the processor is busy: {load:.1f} programs at work on {cores} over the last minute"
    slower = (load + num_cores) / num_cores
    return f"{words}, so that trials on it may take up to {slower:.1f} times as long as predicted"


def busy_notes(devices: Sequence[DeviceProfile], load: float | None) -> tuple[str, ...]:
    """Return warnings about what slows down trials on these devices now; none for assumed devices.

    That is other load on the processor where trials run on it, other processes on a GPU, and throttling.
    """
    here = [device for device in devices if not device.is_assumed]
    # A GPU's time is its own.
    num_cores = sum(device.num_cores for device in here if device.kind.traits.is_split_by_cores)
    notes = [describe_load(load, num_cores)]
    for gpu in here:
        name = f"GPU {gpu.index} ({gpu.name})"
        if reasons := sorted(set(gpu.throttle_reasons) - USUAL_REASONS):
            heat = "" if gpu.temperature_c is None else f" at {gpu.temperature_c} °C"
            notes.append(f"{name} slows itself down{heat} ({', '.join(reasons)}), so that trials take longer")
        if gpu.processes:
            who = ", ".join(f"{process.name} ({process.pid})" for process in gpu.processes)
            notes.append(f"{name} is used by {who} too, which makes trials slower than predicted")
    return tuple(f"{note[0].upper()}{note[1:]}." for note in notes if note)
