"""What sharing a device costs, measured on the trials that do."""

from __future__ import annotations

from collections.abc import Collection

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.scheduler.decide.sharing import assumed_overhead, measured_overhead
from autosft.scheduler.loop.state import Loop, Running

#: A trial has shared its device when others kept it busy for more than this, on average.
SOME_LOAD = 0.05


def overhead_of(loop: Loop, device: DeviceProfile) -> float:
    """Return what sharing a device is reckoned to cost."""
    assumed = assumed_overhead(device, is_mps_on=loop.run.is_mps_on)
    return assumed if device.kind is DeviceKind.CPU else measured_overhead(assumed, loop.overheads)


def keep_company(loop: Loop, device_uuids: Collection[str]) -> None:
    """Add up who shared these devices so far; called before a trial comes to them or leaves them."""
    now = loop.runner.now()
    here = [one for one in loop.running.values() if not set(device_uuids).isdisjoint(one.job.device_uuids)]
    load = sum(one.option.load for one in here)
    for one in here:
        one.company_load_s += load * (now - one.company_since)
        one.company_s += now - one.company_since
        one.company_since = now


def learn_speed(loop: Loop, running: Running, tokens_per_s: float) -> bool:
    """Keep how fast a trial was against its prediction: alone for durations, shared for the overhead.

    Returns whether it had its devices to itself.
    """
    plan = running.job.plan
    if plan.predicted_tokens_per_s <= 0:
        return False
    ratio = tokens_per_s / plan.predicted_tokens_per_s  # the prediction has been corrected already
    mean_load = running.company_load_s / running.company_s if running.company_s > 0 else 0.0
    device = loop.seen[running.job.device_uuids[0]]
    on_cpu = device is not None and device.device.kind is DeviceKind.CPU
    was_alone = on_cpu or mean_load <= running.option.load + SOME_LOAD
    if was_alone:
        loop.speed_ratios.setdefault(plan.device_name, []).append(ratio * running.correction)
    else:
        loop.overheads.append(1.0 / (ratio * mean_load))
    return was_alone
