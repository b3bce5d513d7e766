"""Leases of this machine's devices, shared by all autosft processes of the machine."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile, usable_bytes
from autosft.profiles.hardware.discover import refresh
from autosft.profiles.hardware.leases import Lease, Leases, describe_leases


class MachineLeases:
    """Leases bytes of this machine's devices, out of what is free at the moment."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    def acquire(
        self, device: DeviceProfile, num_bytes: int, *, num_threads: int, study: str, trial: int, until: float
    ) -> Lease | None:
        """Return a lease, or None if other holders or programs leave too little."""
        [now] = refresh(ClusterProfile(devices=(device,), driver_version=None, cuda_version=None)).devices
        takes_cores = device.kind.traits.is_split_by_cores
        return self._leases.acquire(
            device.uuid,
            num_bytes,
            total_bytes=now.total_bytes,
            free_bytes=now.free_bytes,
            study=study,
            trial=trial,
            ends_at=until,
            num_cores=num_threads if takes_cores else 0,
            total_cores=device.num_cores if takes_cores else 0,
        )

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
        if not leases:
            return f"Waiting: other programs use the memory of {device.name}."
        return "Waiting. " + describe_leases(leases, now=time.time())
