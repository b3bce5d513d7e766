"""Whether trials gain from sharing a device, and what it costs them.  Pure.

A trial alone keeps its device busy for a share of the time, its load: a small model leaves a GPU idle while
Python launches the next kernel, and a CPU trial has its threads' share of the cores.  Trials together get
their full speed until their loads fill the device, and share it in proportion from there on.  Sharing is not
free: with time-slicing the kernels of different processes never run side by side, and the device changes
between contexts.  `overhead` is that cost as a factor on the loads, assumed at first and measured during the
study.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.scheduler.decide.budget import DEFAULT_NUM_TRIALS

#: Another trial has to raise what a device gets done by so much to be worth slowing the others down.
WORTHWHILE_GAIN = 1.1
#: Assumed until measured; nobody has published a figure for fine-tuning steps.
TIME_SLICING_OVERHEAD = 1.1
#: Under MPS kernels of several processes run side by side in one context.
MPS_OVERHEAD = 1.02
#: Beyond so many trials a GPU every further one gains little and its context costs memory.
MAX_SHARING = 8
#: A measured overhead is believed from this many shared attempts on.
MIN_MEASURED = 2
#: No sharing slows trials more than this: beyond, something else did.
MAX_OVERHEAD = 10.0


def slowdown(load: float, num_trials: int, overhead: float) -> float:
    """Return by how much each of `num_trials` with `load` in sum takes longer than alone on the device."""
    return 1.0 if num_trials <= 1 else max(1.0, overhead * load)


def work_rate(load: float, num_trials: int, overhead: float) -> float:
    """Return what the device gets done, in seconds of a trial that fills it per second: at most 1."""
    return load / slowdown(load, num_trials, overhead)


def pays(load: float, num_trials: int, more: float, overhead: float) -> bool:
    """Tell whether a trial of load `more` is worth adding to a device where `num_trials` run already.

    It is where nobody is slowed down, or where the device gets noticeably more done.
    """
    together = slowdown(load + more, num_trials + 1, overhead)
    if num_trials == 0 or together <= 1.0 + 1e-9:
        return True
    return (load + more) / together >= WORTHWHILE_GAIN * work_rate(load, num_trials, overhead)


def best_number(fits: Callable[[int], tuple[float, float] | None], overhead: float) -> int:
    """Return how many equal trials to run on a GPU at once.

    `fits(k)` gives (tokens per second alone, load) of the plan with a k-th of the device's memory, or None
    where no plan fits in it.  More trials have to pay in sum, though each has to do with less memory.
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
    """Return what sharing a device costs before anything was measured.  CPU trials have their own cores."""
    if device.kind is DeviceKind.CPU:
        return 1.0
    return MPS_OVERHEAD if is_mps_on else TIME_SLICING_OVERHEAD


def measured_overhead(assumed: float, measured: Sequence[float]) -> float:
    """Return the overhead to reckon with: the median of what shared attempts have shown, once there are some.

    One value per attempt: slowed down by so much, over the mean load of its device meanwhile.
    """
    if len(measured) < MIN_MEASURED:
        return assumed
    return min(MAX_OVERHEAD, max(1.0, statistics.median(measured)))
