"""The devices that a server hands out: what they have, and what other programs leave of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile, usable_bytes
from autosft.profiles.hardware.discover import profile_hardware, refresh, select
from autosft.profiles.hardware.leases import LeaseInfo, Leases
from autosft.scheduler.decide.sharing import MAX_SHARING, assumed_overhead
from autosft.service.values import Device, is_elsewhere


class Devices(Protocol):
    """What the loop asks of the devices."""

    def read(self, own_pids: Collection[int]) -> tuple[Device, ...]:
        """Return the devices with what others than the drivers `own_pids` leave of them."""


class MachineDevices:
    """The devices of this machine.

    `hardware` is as `--hardware` takes it, `gpus` as `--gpus`.  Raises UserError as these do.
    """

    def __init__(self, hardware: str, *, gpus: str | None = None, leases: Leases | None = None) -> None:
        cluster = profile_hardware(hardware)
        self._cluster = cluster if gpus is None else select(cluster, gpus)
        self._leases = leases or Leases()

    @property
    def cluster(self) -> ClusterProfile:
        """The devices as they were found."""
        return self._cluster

    def read(self, own_pids: Collection[int]) -> tuple[Device, ...]:
        now = refresh(self._cluster)
        return tuple(
            device_from(profile, self._leases.held(profile.uuid), own_pids=own_pids)
            for profile in now.devices
        )


def device_kind(profile: DeviceProfile) -> str:
    """Return the kind of a device, shared by those that take the same plans: its name and its size.

    Devices of the server's machine and of other nodes of a cluster are of two kinds: only studies run there,
    and a study that does runs on that cluster.
    """
    kind = f"{profile.name}, {profile.total_bytes / (1 << 30):.0f} GiB"
    return f"{kind}, other nodes" if is_elsewhere(profile.node) else kind


def device_from(
    profile: DeviceProfile, leases: Collection[LeaseInfo], *, own_pids: Collection[int]
) -> Device:
    """Return a device as the queue sees it.

    Usable is what is free now and what our drivers have leased of it, whether they use that already or not;
    what other autosft processes have leased is not.
    """
    ours = sum(lease.num_bytes for lease in leases if lease.pid in own_pids)
    others = sum(lease.num_bytes for lease in leases if lease.pid not in own_pids)
    free_bytes = usable_bytes(profile) + ours
    return Device(
        uuid=profile.uuid,
        kind=device_kind(profile),
        name=profile.name,
        node=profile.node,
        index=profile.index,
        total_bytes=profile.total_bytes,
        usable_bytes=max(0, min(free_bytes, profile.total_bytes - others)),
        max_items=MAX_SHARING,
        overhead=assumed_overhead(profile, is_mps_on=False),
        link_bytes_per_s=profile.link_bytes_per_s,
    )
