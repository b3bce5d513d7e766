"""Where a trial runs: a plain function over what is free.

Limits of this version: a trial takes one device, and a GPU serves one trial at a time.  A CPU device serves
as many as it has slots and memory for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autosft.profiles.hardware import DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """A device and what is left of it right now."""

    device: DeviceProfile
    free_bytes: int  # free memory less what running trials were promised
    free_slots: int  # how many more trials may start on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The devices that a trial gets."""

    device_uuids: tuple[str, ...]


def place(need_bytes: int, devices: Sequence[DeviceState]) -> Placement | None:
    """Choose a device for one trial, or None when it has to wait.

    A device is feasible when it has a free slot and the trial's upper bound fits in what is free on it.
    Among feasible devices the fastest wins, then the tightest fit, then the lowest UUID, so that equal
    inputs in any order give equal answers.
    """
    feasible = [state for state in devices if state.free_slots > 0 and need_bytes <= state.free_bytes]
    best = min(feasible, key=_preference, default=None)
    return None if best is None else Placement(device_uuids=(best.device.uuid,))


def _preference(state: DeviceState) -> tuple[float, int, str]:
    return (-(state.device.matmul_flops_per_s or 0.0), state.free_bytes, state.device.uuid)
