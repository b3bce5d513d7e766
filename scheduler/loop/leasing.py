"""Leases of this machine's devices, shared by all autosft processes of the machine."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile, usable_bytes
from autosft.profiles.hardware.discover import refresh
from autosft.profiles.hardware.lease_queue import STALE_S, describe_ahead
from autosft.profiles.hardware.leases import Lease, Leases, describe_leases


class MachineLeases:
    """Leases bytes of this machine's devices, out of what is free at the moment."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._asked: dict[str, tuple[float, float]] = {}  # by device, since when it is waited for, asked last

    def acquire(
        self, device: DeviceProfile, num_bytes: int, *, num_threads: int, study: str, trial: int, until: float
    ) -> Lease | None:
        """Return a lease, or None if other holders or programs leave too little.

        The process that has waited longest comes first; a refusal keeps this process's place.
        """
        [now] = refresh(ClusterProfile(devices=(device,), driver_version=None, cuda_version=None)).devices
        takes_cores = device.kind.traits.is_split_by_cores
        asked_at = time.time()
        arrived_at, last_at = self._asked.get(device.uuid, (asked_at, asked_at))
        if abs(asked_at - last_at) > STALE_S:  # not requested for a while: others may have come first
            arrived_at = asked_at
        self._asked[device.uuid] = arrived_at, asked_at
        lease = self._leases.acquire(
            device.uuid,
            num_bytes,
            total_bytes=now.total_bytes,
            free_bytes=now.free_bytes,
            study=study,
            trial=trial,
            ends_at=until,
            num_cores=num_threads if takes_cores else 0,
            total_cores=device.num_cores if takes_cores else 0,
            arrived_at=arrived_at,
        )
        if lease is not None:
            del self._asked[device.uuid]
        return lease

    def available_bytes(self, device: DeviceProfile) -> int:
        """Return the bytes of a device that could be leased now, keeping a tenth of free RAM in reserve."""
        [now] = refresh(ClusterProfile(devices=(device,), driver_version=None, cuda_version=None)).devices
        free_bytes = self._leases.available_bytes(
            device.uuid, total_bytes=now.total_bytes, free_bytes=now.free_bytes
        )
        return usable_bytes(replace(now, free_bytes=free_bytes))

    def holders(self, device: DeviceProfile) -> str:
        """Describe which other studies hold how much of a device until when, or that other programs do."""
        leases = [lease for lease in self._leases.held(device.uuid) if lease.pid != os.getpid()]
        arrived_at, _ = self._asked.get(device.uuid, (time.time(), 0.0))
        ahead = self._leases.ahead(device.uuid, arrived_at=arrived_at)
        if not (leases or ahead):
            return f"Waiting: other programs use the memory of {device.name}."
        told = (describe_leases(leases, now=time.time()), describe_ahead(ahead))
        return " ".join(["Waiting.", *filter(None, told)])

    def are_held(self, device: DeviceProfile) -> bool:
        """Whether another autosft process holds or waits for some of a device, so that waiting will end."""
        leases = [lease for lease in self._leases.held(device.uuid) if lease.pid != os.getpid()]
        return bool(leases or self._leases.ahead(device.uuid, arrived_at=time.time()))

    def most_bytes(self, device: DeviceProfile) -> int:
        """Return the bytes of a device that could be leased if it had no other users."""
        if device.kind.traits.has_own_memory:
            return device.total_bytes
        return max(0, device.total_bytes - own_bytes())


def own_bytes() -> int:
    """Return the memory of this process and those that it has started, pages that they share counted once.

    Trials that run are among them: ask when none does.
    """
    import psutil

    num_bytes = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            used = process.memory_info()
            num_bytes += used.rss - getattr(used, "shared", 0)
    return num_bytes
