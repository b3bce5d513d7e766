"""The cost of sharing a device, measured on trials that do.  Writes `Loop.speed`."""

from __future__ import annotations

import statistics

from autosft.profiles.hardware.device import DeviceProfile
from autosft.scheduler.decide.sharing import assumed_overhead, measured_overhead
from autosft.scheduler.loop.fleet import is_split_by_cores
from autosft.scheduler.loop.state import Loop, RunningAttempt

#: A trial counts as sharing its device if the average load from others exceeds this.
NEGLIGIBLE_LOAD = 0.05


def sharing_overhead(loop: Loop, device: DeviceProfile) -> float:
    """Return the factor by which sharing a device is expected to slow its trials."""
    assumed = assumed_overhead(device, is_mps_on=loop.run.is_mps_on)
    return (
        assumed if device.kind.traits.is_split_by_cores else measured_overhead(assumed, loop.speed.overheads)
    )


def speed_ratio(loop: Loop, device_name: str) -> float:
    """Return the speed of this study's trials on devices of this name, relative to the prediction."""
    measured = loop.speed.ratios.get(device_name)
    return statistics.median(measured) if measured else 1.0


def record_speed(loop: Loop, attempt: RunningAttempt, tokens_per_s: float) -> bool:
    """Record an attempt's speed relative to its prediction; return whether it had its devices to itself.

    If so, the speed corrects predicted durations; if not, the overhead of sharing.
    """
    plan = attempt.job.plan
    if plan.predicted_tokens_per_s <= 0:
        return False
    ratio = tokens_per_s / plan.predicted_tokens_per_s  # the prediction includes earlier corrections
    mean_load = attempt.load_integral_s / attempt.load_s if attempt.load_s > 0 else 0.0
    has_own_cores = is_split_by_cores(loop, attempt.job.device_uuids[0])
    was_alone = has_own_cores or mean_load <= attempt.option.load + NEGLIGIBLE_LOAD
    if was_alone:
        loop.speed.ratios.setdefault(plan.device_name, []).append(ratio * attempt.speed_correction)
    else:
        loop.speed.overheads.append(1.0 / (ratio * mean_load))
    return was_alone
