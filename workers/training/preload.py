"""Hold what a process has loaded for an attempt before the attempt exists.

While trials run, another process on the node loads what the next trial will need (`starters.prepare`), so
that no device idles meanwhile.  It touches no device, and results do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from autosft.profiles.hardware.host import profile_host
from autosft.studies.trial import TrialJob
from autosft.workers.device import device_of, resident_bytes

T = TypeVar("T")

_held: dict[Hashable, object] = {}
_resident_before: list[int] = []


def has_room(job: TrialJob, *, free_bytes: int, total_bytes: int) -> bool:
    """Return whether host memory has room for another copy of a job's weights next to the running trials.

    At least half of it has to stay free.  If host memory is the device's memory too, the weights may take
    half of the tenth that trials leave free.
    """
    weights_bytes = dict(job.plan.estimate.components).get("parameters", 0)
    share = 20 if device_of(job).uses_host_memory else 2
    return weights_bytes <= total_bytes // share and free_bytes - weights_bytes >= total_bytes // 2


def begin(job: TrialJob) -> bool:
    """Record the memory of this process before it loads anything; return whether it may load weights too."""
    _resident_before.append(resident_bytes("VmRSS"))
    host = profile_host()
    return has_room(job, free_bytes=host.free_bytes, total_bytes=host.total_bytes)


def hold(key: Hashable, load: Callable[[], object]) -> None:
    """Load something and keep it under a key of everything that it depends on."""
    _held[key] = load()


def take(key: Hashable, load: Callable[[], T]) -> T:
    """Return what is held under a key, which is then dropped, or load it."""
    return _held.pop(key) if key in _held else load()  # type: ignore[return-value]


def drop() -> None:
    """Drop whatever the attempt did not take."""
    _held.clear()


def baseline_bytes() -> int | None:
    """Return the resident memory before anything was loaded ahead, None if nothing was."""
    return _resident_before[0] if _resident_before else None
