"""A device and a cluster of devices, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass

from autosft.profiles.hardware.device_kinds import DeviceKind, DeviceTraits


def usable_bytes(device: DeviceProfile) -> int:
    """Return what trials may use of a device: all that is free on a GPU, nine tenths of free RAM on a CPU."""
    return device.free_bytes * device.traits.usable_percent // 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProcess:
    """Another process that holds memory of a device."""

    pid: int
    name: str
    used_bytes: int | None  # None where the driver does not say (containers, Windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One device, as it was found or as it is known.

    Rates are the vendor's dense peaks (source in the table of known devices) until `autosft profile`
    has measured this machine; `rates_measured` says which.
    """

    uuid: str  # NVML's "GPU-…" or "MIG-…"; "CPU-<hostname>" for a machine's cores and RAM
    kind: DeviceKind
    name: str
    node: str  # host name
    index: int  # NVML index on its node; 0 for the CPU
    total_bytes: int
    free_bytes: int  # at the time of profiling; other processes and the desktop are already taken off
    compute_capability: tuple[int, int] | None  # None for the CPU
    supports_bf16: bool
    num_cores: int  # CPU cores for CPU devices, streaming multiprocessors for GPUs (0 if unknown)
    matmul_flops_per_s: float | None  # 16-bit dense with fp32 accumulation (CPU: fp32), all cores
    memory_bytes_per_s: float | None
    rates_measured: bool
    context_bytes: int  # what a process takes on the device before its first tensor (0 on the CPU)
    is_mig: bool
    is_assumed: bool  # from a name or a file, not found in this machine
    power_limit_w: float | None
    temperature_c: float | None
    throttle_reasons: tuple[str, ...]
    processes: tuple[DeviceProcess, ...]
    link_bytes_per_s: float | None = None  # to another GPU of the node, one direction (NVLink, else PCIe)
    host_link_bytes_per_s: float | None = None  # to the host's memory, one direction
    reused_bytes_per_s: float | None = None  # measured, CPU: operators over memory that they had before
    bf16_flops_per_s: float | None = None  # measured, CPU with bf16 instructions: bf16 products, all cores
    all_reduce_bytes_per_s: float | None = None  # measured: sent per GPU while those of the node add up

    @property
    def traits(self) -> DeviceTraits:
        """What devices of this kind do differently from others."""
        return self.kind.traits


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterProfile:
    """All devices that a study may use, over all nodes; never empty."""

    devices: tuple[DeviceProfile, ...]
    driver_version: str | None
    cuda_version: str | None
    notes: tuple[str, ...] = ()  # for the user: what could not be read or was left out, and why


__all__ = ["ClusterProfile", "DeviceKind", "DeviceProcess", "DeviceProfile", "DeviceTraits", "usable_bytes"]
