"""What kinds of devices do differently in a trial's process, one class each.

Facts that need no process of a trial are in `profiles.hardware.device_kinds`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from autosft.profiles.hardware.busy import load_now, num_free_cores
from autosft.profiles.hardware.device_kinds import DeviceKind, kind_of_uuid
from autosft.profiles.hardware.host import profile_host
from autosft.profiles.memory.allocator.trial_settings import SETTINGS, can_expand, is_chosen
from autosft.profiles.memory.host_kernels import compiles_per_shape
from autosft.studies.trial import FailureKind, TrialJob


class MemoryMeter(Protocol):
    """Measures the peak memory of this process from its creation on."""

    def peak(self) -> tuple[int | None, int | None]:
        """Return (peak allocated, peak reserved) in bytes; None for what the device does not distinguish."""
        ...


class TrialDevice(Protocol):
    """Everything that a training process does differently on different kinds of devices."""

    #: `torch.device.type`.
    torch_name: str
    #: The backends of torch.distributed in a gang.
    collective_backend: str
    #: Whether tensors are in the host's memory, where the operating system enforces the cap.
    uses_host_memory: bool
    #: The kind of failure when an allocation in the host's memory fails.
    host_allocation_failure: FailureKind

    def environment(self, uuids: Sequence[str]) -> dict[str, str]:
        """Return the environment variables that make only these devices visible to a process."""
        ...

    def set_allocator(self) -> None:
        """Set the allocator's options before the first allocation, unless the user has set them."""
        ...

    def allocator_warning(self) -> str:
        """Return a warning if the allocator, after an allocation, does not follow its settings; else ""."""
        ...

    def select(self, local_rank: int) -> None:
        """Make the device of this rank the current one."""
        ...

    def meter(self, cap_bytes: int, *, baseline_bytes: int | None = None) -> MemoryMeter:
        """Measure from now on and enforce the cap where the device's allocator can.

        Memory counts from `baseline_bytes`, where this process has loaded parts of the attempt earlier.
        """
        ...

    def free_bytes(self) -> int:
        """Return the bytes that generation may use."""
        ...

    def generators(self) -> list[int]:
        """Return the devices with a random generator of their own (for `torch.random.fork_rng`)."""
        ...

    def watched(self, uuids: Sequence[str]) -> tuple[str, ...]:
        """Return the devices whose clocks and temperatures NVML reports while a trial runs."""
        ...

    def wait_until_released(self, pid: int, uuids: Sequence[str], *, timeout_s: float = 10.0) -> bool:
        """Wait until an ended process holds no memory on the devices; return whether that was confirmed."""
        ...


def device_of(job: TrialJob) -> TrialDevice:
    """Return the kind of device that a job runs on, by its UUIDs."""
    kinds = {kind_of_uuid(uuid) for uuid in job.device_uuids}
    return _DEVICES[kinds.pop()] if len(kinds) == 1 else CUDA


def pads_to_few_sizes(job: TrialJob) -> bool:
    """Whether a job's rows are padded to few sizes, since its device compiles products for each."""
    device = DeviceKind.CPU if device_of(job).uses_host_memory else DeviceKind.CUDA
    return compiles_per_shape(job.pinned.precision, device)


@functools.cache
def use_free_cores() -> None:
    """Have torch compute on the cores that others leave; found once, since later its own load counts."""
    import torch

    torch.set_num_threads(num_free_cores(load_now(), torch.get_num_threads()))


def local_device() -> TrialDevice:
    """Return the kind of device that models are loaded on outside of trials: a GPU if there is one."""
    import torch

    return CUDA if torch.cuda.is_available() else CPU


class CpuDevice:
    """Cores and memory of the host.

    The kernel enforces the cap (`workers.processes.memory_limit`), not torch.
    """

    torch_name = DeviceKind.CPU.traits.torch_name
    collective_backend = "gloo"
    uses_host_memory = not DeviceKind.CPU.traits.has_own_memory
    host_allocation_failure = FailureKind.OUT_OF_MEMORY

    def environment(self, uuids: Sequence[str]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ""}

    def set_allocator(self) -> None: ...

    def allocator_warning(self) -> str:
        return ""

    def select(self, local_rank: int) -> None: ...

    def meter(self, cap_bytes: int, *, baseline_bytes: int | None = None) -> MemoryMeter:
        return ResidentMeter(baseline_bytes)

    def free_bytes(self) -> int:
        """Return half of free RAM."""
        return profile_host().free_bytes // 2

    def generators(self) -> list[int]:
        return []

    def watched(self, uuids: Sequence[str]) -> tuple[str, ...]:
        return ()

    def wait_until_released(self, pid: int, uuids: Sequence[str], *, timeout_s: float = 10.0) -> bool:
        return True  # the kernel has reclaimed it when the process is gone


class CudaDevice:
    """NVIDIA GPUs: torch's caching allocator, NCCL, NVML."""

    torch_name = DeviceKind.CUDA.traits.torch_name
    collective_backend = "cpu:gloo,cuda:nccl"
    uses_host_memory = not DeviceKind.CUDA.traits.has_own_memory
    host_allocation_failure = FailureKind.HOST_OUT_OF_MEMORY

    def environment(self, uuids: Sequence[str]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}

    def set_allocator(self) -> None:
        """Use expandable segments where the system supports them and the user has not chosen otherwise.

        Set through torch, since the environment was read when the warm server imported it.
        """
        import torch

        if can_expand() and not is_chosen(os.environ):
            torch._C._accelerator_setAllocatorSettings(SETTINGS)

    def allocator_warning(self) -> str:
        import torch

        told = torch._C._accelerator_getAllocatorSettings()
        segments: list[dict[str, Any]] = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        if SETTINGS not in told or any(segment.get("is_expandable") for segment in segments):
            return ""
        return (
            f"The allocator's settings are {told!r}, but its segments do not expand: is the driver too old?"
        )

    def select(self, local_rank: int) -> None:
        import torch

        torch.cuda.set_device(local_rank)

    def meter(self, cap_bytes: int, *, baseline_bytes: int | None = None) -> MemoryMeter:
        return CudaMeter(cap_bytes)

    def free_bytes(self) -> int:
        """Return nine tenths of what is free on the current GPU."""
        import torch

        return torch.cuda.mem_get_info()[0] * 9 // 10

    def generators(self) -> list[int]:
        import torch

        return [torch.cuda.current_device()]

    def watched(self, uuids: Sequence[str]) -> tuple[str, ...]:
        return tuple(uuids)

    def wait_until_released(self, pid: int, uuids: Sequence[str], *, timeout_s: float = 10.0) -> bool:
        """Wait until NVML no longer lists the process on any of the GPUs.

        NVML lags process exit by up to a second; a slot freed earlier makes the next trial run out of memory.
        In a container with its own process ids NVML reports no pids, and there is nothing to wait for.
        """
        import pynvml

        deadline = time.monotonic() + timeout_s
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return False
        try:
            handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            while any(p.pid == pid for h in handles for p in pynvml.nvmlDeviceGetComputeRunningProcesses(h)):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.02)
        except pynvml.NVMLError:
            return False
        finally:
            pynvml.nvmlShutdown()
        return True


#: The only instances: kinds of devices have no state.
CPU: TrialDevice = CpuDevice()
CUDA: TrialDevice = CudaDevice()
_DEVICES = {DeviceKind.CPU: CPU, DeviceKind.CUDA: CUDA}


class CudaMeter:
    """Reads torch's allocator, and caps it with `set_per_process_memory_fraction`."""

    def __init__(self, cap_bytes: int) -> None:
        import torch

        device = torch.cuda.current_device()
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes))
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> tuple[int | None, int | None]:
        import torch

        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


class ResidentMeter:
    """Reads resident memory above a baseline (forked processes count the pages they share)."""

    def __init__(self, baseline_bytes: int | None = None) -> None:
        """Count from `baseline_bytes`, or without it from what is resident now."""
        reset_peak_resident()
        self.baseline_bytes = resident_bytes("VmRSS") if baseline_bytes is None else baseline_bytes

    def peak(self) -> tuple[int | None, int | None]:
        return max(0, resident_bytes("VmHWM") - self.baseline_bytes), None


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes; outside Linux current resident memory for both."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    line = next(line for line in status.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def reset_peak_resident() -> None:
    """Reset VmHWM to VmRSS (Linux; elsewhere the peak includes what came before)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
