"""The tuning loop's view of the leases that all autosft processes of a machine keep."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from autosft.profiles.hardware.device import ClusterProfile, DeviceKind, DeviceProfile, usable_bytes
from autosft.profiles.hardware.discover import refresh
from autosft.profiles.hardware.leases import Lease, Leases, describe_leases


class MachineLeases:
    """Leases bytes of this machine's devices against what is free on them at this moment."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    def acquire(
        self, device: DeviceProfile, num_bytes: int, *, num_threads: int, study: str, trial: int, until: float
    ) -> Lease | None:
        """Return a lease, or None when other holders or programs leave too little right now."""
        [now] = refresh(ClusterProfile(devices=(device,), driver_version=None, cuda_version=None)).devices
        on_cpu = device.kind is DeviceKind.CPU
        return self._leases.acquire(
            device.uuid,
            num_bytes,
            total_bytes=now.total_bytes,
            free_bytes=now.free_bytes,
            study=study,
            trial=trial,
            ends_at=until,
            num_cores=num_threads if on_cpu else 0,
            total_cores=device.num_cores if on_cpu else 0,
        )

    def available_bytes(self, device: DeviceProfile) -> int:
        """Return how much of a device could be leased at this moment, a tenth of free RAM left alone."""
        [now] = refresh(ClusterProfile(devices=(device,), driver_version=None, cuda_version=None)).devices
        free_bytes = self._leases.available_bytes(
            device.uuid, total_bytes=now.total_bytes, free_bytes=now.free_bytes
        )
        return usable_bytes(replace(now, free_bytes=free_bytes))

    def holders(self, device: DeviceProfile) -> str:
        """Say which other studies hold what of a device until about when, or that programs fill it."""
        leases = [one for one in self._leases.held(device.uuid) if one.pid != os.getpid()]
        if not leases:
            return f"Waiting: other programs use the memory of {device.name}."
        return "Waiting. " + describe_leases(leases, now=time.time())
