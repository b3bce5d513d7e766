"""Cores and RAM of this machine as a device, within the limits of its control group."""

from __future__ import annotations

import math
import os
import platform
import socket
from dataclasses import replace
from pathlib import Path

import psutil

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceKind, DeviceProfile


def host_name() -> str:
    """Return the `node` of this machine's devices."""
    return socket.gethostname()


def profile_host(*, root: Path = Path("/")) -> DeviceProfile:
    """Return this machine's CPU as a device; its memory is the RAM that this process may use.

    Memory and cores are the minimum of what the machine has, the process's CPU affinity, and the limits of
    every control group above it (versions 1 and 2; `root` replaces the file system's root in tests).  Swap
    does not count: a trial that swaps is slower than one that waits.
    """
    total_bytes, free_bytes = memory_of_host(root=root)
    quotas = [quota for folder in _group_folders(root, controller="cpu") if (quota := _cpu_quota(folder))]
    num_cores = max(1, math.floor(min([_num_usable_cpus(), *quotas])))
    return DeviceProfile(
        uuid=f"CPU-{host_name()}",
        kind=DeviceKind.CPU,
        name=_cpu_name(root),
        node=host_name(),
        index=0,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        compute_capability=None,
        supports_bf16=_has_bf16(root),
        num_cores=num_cores,
        matmul_flops_per_s=None,
        memory_bytes_per_s=None,
        rates_measured=False,
        context_bytes=0,
        is_mig=False,
        is_assumed=False,
        power_limit_w=None,
        temperature_c=None,
        throttle_reasons=(),
        processes=(),
    )


def memory_of_host(*, root: Path = Path("/")) -> tuple[int, int]:
    """Return the RAM that this process may use, in bytes, and what of it is free."""
    memory = psutil.virtual_memory()
    limits = _group_folders(root, controller="memory")
    total_bytes = min([memory.total, *(limit for folder in limits if (limit := _memory_limit(folder)))])
    free_bytes = min(
        [
            memory.available,
            *(limit - _memory_used(folder) for folder in limits if (limit := _memory_limit(folder))),
        ]
    )
    return total_bytes, max(0, min(free_bytes, total_bytes))


def unified_reserve_bytes(total_bytes: int) -> int:
    """Return what a GPU that shares the machine's RAM leaves to the host: 16 GB, at most a fifth.

    NVIDIA's RTX Spark porting guide leaves 16 GB to the CPU.  Beyond it, running out of memory stops the
    machine instead of the trial.
    """
    return min(16_000_000_000, total_bytes // 5)


def split_host(number: int) -> tuple[DeviceProfile, ...]:
    """Return this machine's CPU as `number` devices with equal numbers of cores and bytes.

    Raises UserError for more devices than there are cores.
    """
    host = profile_host()
    if not 1 <= number <= host.num_cores:
        raise UserError(
            f"--hardware {number}xcpu: this machine has {host.num_cores} cores.",
            remedy=f"Use 1 to {host.num_cores} devices: each needs a core.",
        )
    return tuple(
        replace(
            host,
            uuid=f"{host.uuid}-{index}of{number}",
            name=f"1/{number} of {host.name}",
            index=index,
            total_bytes=host.total_bytes // number,
            free_bytes=host.free_bytes // number,
            num_cores=host.num_cores // number,
        )
        for index in range(number)
    )


def _num_usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # absent on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _group_folders(root: Path, *, controller: str) -> list[Path]:
    """Return this process's control group for `controller` and its parents, where they are visible.

    In a container the path in /proc/self/cgroup is often the host's and does not exist; the mount then shows
    the container's own group at the top, which the walk upwards reaches in any case.
    """
    folders: list[Path] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = top / path.lstrip("/")
        above = [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
        folders += [folder for folder in above if folder.is_dir()]
    return folders


def _memory_limit(folder: Path) -> int | None:
    """Return the group's limit in bytes, None for no limit."""
    text = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    if text is None or text == "max":
        return None
    # Version 1 writes "no limit" as the largest multiple of the page size.
    return int(text) if int(text) < 1 << 60 else None


def _memory_used(folder: Path) -> int:
    """Return the bytes charged to the group that the kernel cannot reclaim on demand."""
    text = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
    statistics = dict(
        line.split(maxsplit=1) for line in (_read(folder / "memory.stat") or "").splitlines() if line
    )
    reclaimable = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
    return max(0, int(text or 0) - int(reclaimable))


def _cpu_quota(folder: Path) -> float | None:
    """Return the group's bandwidth in cores, None for no limit."""
    text = _read(folder / "cpu.max")
    if text is None:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        text = f"{quota} {period}" if quota and period else "max"
    quota, _, period = text.partition(" ")
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _cpu_name(root: Path) -> str:
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def _has_bf16(root: Path) -> bool:
    """Return whether the CPU multiplies bf16 in hardware; elsewhere torch emulates it, slower than fp32."""
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith(("flags", "Features")):
            return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(line.split()))
    return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
