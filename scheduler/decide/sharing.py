"""Whether trials gain from sharing a device, and what that costs.  Pure.

A trial alone keeps its device busy for a share of the time, its load: a small model leaves a GPU idle while
Python launches the next kernel, and a CPU trial uses its threads' share of the cores.  Trials run at full
speed together until their loads fill the device; beyond that they share it in proportion.  Sharing is not
free: with time-slicing, kernels of different processes never run concurrently, and the device switches
between contexts.  `overhead` is that cost as a factor on the loads: assumed at first, measured during the
study.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from autosft.profiles.hardware.device import DeviceProfile
from autosft.scheduler.decide.budget import DEFAULT_NUM_TRIALS

#: Minimum gain in a device's throughput that justifies slowing down its trials with another one.
WORTHWHILE_GAIN = 1.1
#: Assumed until measured; there is no published figure for fine-tuning steps.
TIME_SLICING_OVERHEAD = 1.1
#: With MPS, kernels of several processes run concurrently in one context.
MPS_OVERHEAD = 1.02
#: Maximum number of trials on a GPU: further ones gain little, and their contexts cost memory.
MAX_SHARING = 8
#: Number of shared attempts from which on a measured overhead is used.
MIN_MEASURED = 2
#: Maximum credible overhead: beyond it, something other than sharing slowed the trials down.
MAX_OVERHEAD = 10.0


def slowdown(load: float, num_trials: int, overhead: float) -> float:
    """Return the factor by which each of `num_trials` with total `load` is slower than alone."""
    return 1.0 if num_trials <= 1 else max(1.0, overhead * load)


def work_rate(load: float, num_trials: int, overhead: float) -> float:
    """Return a device's throughput, in seconds of a trial that fills it per second: at most 1."""
    return load / slowdown(load, num_trials, overhead)


def pays(load: float, num_trials: int, more: float, overhead: float) -> bool:
    """Whether adding a trial of load `more` to a device with `num_trials` trials pays.

    It does if no trial is slowed down, or if the throughput of the device increases noticeably.
    """
    together = slowdown(load + more, num_trials + 1, overhead)
    if num_trials == 0 or together <= 1.0 + 1e-9:
        return True
    return (load + more) / together >= WORTHWHILE_GAIN * work_rate(load, num_trials, overhead)


def best_number(fits: Callable[[int], tuple[float, float] | None], overhead: float) -> int:
    """Return how many equal trials to run on a GPU at once.

    `fits(k)` returns (tokens per second alone, load) of the plan within a k-th of the device's memory, or
    None if no plan fits.  More trials have to pay in total, although each has less memory.
    """
    best, best_rate = 1, 0.0
    for number in range(1, MAX_SHARING + 1):
        found = fits(number)
        if found is None:
            break
        tokens_per_s, load = found
        rate = number * tokens_per_s / slowdown(number * load, number, overhead)
        if number == 1 or rate >= WORTHWHILE_GAIN * best_rate:
            best, best_rate = number, rate
    return best


#: A search learns from the trials before, so it runs in so many rounds at least.
MIN_ROUNDS = 3


def at_most_at_once(num_trials: int | None = None) -> int:
    """Return how many trials at once leave the search MIN_ROUNDS rounds to learn from."""
    return math.ceil((num_trials or DEFAULT_NUM_TRIALS) / MIN_ROUNDS)


def trials_on_cores(num_cores: int, *, by_memory: int, at_most: int) -> int:
    """Return how many trials share a CPU: cores do more apart than together, as far as memory goes."""
    return max(1, min(num_cores, by_memory, at_most))


def threads_each(num_cores: int, num_trials: int) -> int:
    """Return the threads of each of so many trials on a CPU."""
    return max(1, num_cores // num_trials)


def assumed_overhead(device: DeviceProfile, *, is_mps_on: bool) -> float:
    """Return the cost of sharing a device before it was measured.  CPU trials do not share cores."""
    if device.kind.traits.is_split_by_cores:
        return 1.0
    return MPS_OVERHEAD if is_mps_on else TIME_SLICING_OVERHEAD


def measured_overhead(assumed: float, measured: Sequence[float]) -> float:
    """Return the overhead to use: the median of the measured values, once there are enough.

    One value per attempt: its slowdown divided by the mean load of its device meanwhile.
    """
    if len(measured) < MIN_MEASURED:
        return assumed
    return min(MAX_OVERHEAD, max(1.0, statistics.median(measured)))
