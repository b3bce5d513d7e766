"""What sharing a device costs, measured on the trials that do.  Writes `Loop.speed`."""

from __future__ import annotations

import statistics

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.scheduler.decide.sharing import assumed_overhead, measured_overhead
from autosft.scheduler.loop.fleet import is_cpu
from autosft.scheduler.loop.state import Loop, RunningAttempt

#: A trial counts as having shared its device when others loaded it by more than this, on average.
NEGLIGIBLE_LOAD = 0.05


def sharing_overhead(loop: Loop, device: DeviceProfile) -> float:
    """Return the factor by which sharing a device is expected to raise the cost of its trials."""
    assumed = assumed_overhead(device, is_mps_on=loop.run.is_mps_on)
    return assumed if device.kind is DeviceKind.CPU else measured_overhead(assumed, loop.speed.overheads)


def speed_ratio(loop: Loop, device_name: str) -> float:
    """Return how fast this study's trials ran on devices of that name, over what was predicted."""
    measured = loop.speed.ratios.get(device_name)
    return statistics.median(measured) if measured else 1.0


def record_speed(loop: Loop, attempt: RunningAttempt, tokens_per_s: float) -> bool:
    """Keep how fast an attempt was, over its prediction; return whether it had its devices to itself.

    Alone, it corrects predicted durations; beside others, the overhead of sharing.
    """
    plan = attempt.job.plan
    if plan.predicted_tokens_per_s <= 0:
        return False
    ratio = tokens_per_s / plan.predicted_tokens_per_s  # of a prediction that was corrected already
    mean_load = attempt.load_integral_s / attempt.load_s if attempt.load_s > 0 else 0.0
    on_cpu = is_cpu(loop, attempt.job.device_uuids[0])
    was_alone = on_cpu or mean_load <= attempt.option.load + NEGLIGIBLE_LOAD
    if was_alone:
        loop.speed.ratios.setdefault(plan.device_name, []).append(ratio * attempt.speed_correction)
    else:
        loop.speed.overheads.append(1.0 / (ratio * mean_load))
    return was_alone
