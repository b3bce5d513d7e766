"""Read NVIDIA GPUs through the driver's management library (NVML), without touching CUDA.

Functions take the library as an argument, so that tests can pass a fake.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import psutil

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceKind, DeviceProcess, DeviceProfile
from autosft.profiles.hardware.host import host_name, profile_host, unified_reserve_bytes
from autosft.profiles.hardware.known_devices import default_context_bytes, known_device_of

T = TypeVar("T")

_THROTTLING = (
    ("HwSlowdown", "hardware slowdown"),
    ("HwThermalSlowdown", "too hot (hardware)"),
    ("SwThermalSlowdown", "too hot (driver)"),
    ("HwPowerBrakeSlowdown", "external power brake"),
    ("SwPowerCap", "power limit"),
)  # NVML's nvmlClocksEventReason…; idling and user-set clocks are no throttling


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """The visible GPUs, possibly none, and notes on what could not be read."""

    devices: tuple[DeviceProfile, ...]
    driver_version: str | None
    cuda_version: str | None
    notes: tuple[str, ...]


def read_gpus(*, nvml: ModuleType | None, environment: Mapping[str, str]) -> GpuReading | None:
    """Return the GPUs that the driver and CUDA_VISIBLE_DEVICES show, or None without an NVIDIA driver.

    Raises UserError when a driver is installed but does not answer.
    """
    if nvml is None:
        nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return None
    except nvml.NVMLError as error:
        raise UserError(f"The NVIDIA driver does not answer: {error}.", remedy=_remedy(nvml, error)) from None
    try:
        return _read_all(nvml, environment)
    finally:
        nvml.nvmlShutdown()


def _remedy(nvml: ModuleType, error: Exception) -> str:
    if isinstance(error, nvml.NVMLError_LibRmVersionMismatch):
        return "The driver was updated while it was loaded: restart the machine. Until then: --hardware cpu."
    if isinstance(error, nvml.NVMLError_NoPermission):
        return "Ask for access to /dev/nvidia* (in a container: --gpus all), or use --hardware cpu."
    return "See whether nvidia-smi works, or use --hardware cpu."


def _read_all(nvml: ModuleType, environment: Mapping[str, str]) -> GpuReading:
    cuda = _maybe(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2)
    cuda_version = None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"
    devices: list[DeviceProfile] = []
    notes: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            devices += _read_gpu(nvml, index, cuda_version)
        except nvml.NVMLError as error:
            notes.append(f"GPU {index} cannot be used: {error}.")
    visible = _visible(devices, environment.get("CUDA_VISIBLE_DEVICES"))
    if devices and not visible:
        notes.append(f"CUDA_VISIBLE_DEVICES hides all {len(devices)} GPUs of this machine.")
    return GpuReading(
        devices=visible,
        driver_version=_maybe(nvml, nvml.nvmlSystemGetDriverVersion),
        cuda_version=cuda_version,
        notes=tuple(notes),
    )


def _read_gpu(nvml: ModuleType, index: int, cuda_version: str | None) -> list[DeviceProfile]:
    """Return one GPU as a device, or its MIG slices: a GPU in MIG mode computes on slices only."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    whole = _read_device(nvml, handle, index, cuda_version)
    mode = _maybe(nvml, nvml.nvmlDeviceGetMigMode, handle)
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return [whole]
    slices: list[DeviceProfile] = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        # Unused slice positions raise NotFound.
        part = _maybe(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number)
        if part is not None:
            slices.append(_read_slice(nvml, part, whole))
    return slices


def _read_device(nvml: ModuleType, handle: Any, index: int, cuda_version: str | None) -> DeviceProfile:
    name = _text(nvml.nvmlDeviceGetName(handle))
    known = known_device_of(name)
    capability = _maybe(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    compute_capability = None if capability is None else (int(capability[0]), int(capability[1]))
    total_bytes, free_bytes = _memory(nvml, handle)
    power_mw = _maybe(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    temperature_c = temperature(nvml, handle)
    return DeviceProfile(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        kind=DeviceKind.CUDA,
        name=name,
        node=host_name(),
        index=index,
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        compute_capability=compute_capability,
        supports_bf16=compute_capability is not None and compute_capability >= (8, 0),
        num_cores=known.num_sms if known is not None else 0,
        matmul_flops_per_s=known.matmul_flops_per_s if known is not None else None,
        memory_bytes_per_s=known.memory_bytes_per_s if known is not None else None,
        rates_measured=False,
        context_bytes=default_context_bytes(compute_capability, cuda_version),
        is_mig=False,
        is_assumed=False,
        power_limit_w=None if power_mw is None else power_mw / 1000,
        temperature_c=None if temperature_c is None else float(temperature_c),
        throttle_reasons=_throttle_reasons(nvml, handle),
        processes=_processes(nvml, handle),
        link_bytes_per_s=known.link_bytes_per_s if known is not None else None,
        host_link_bytes_per_s=known.host_link_bytes_per_s if known is not None else None,
    )


def _read_slice(nvml: ModuleType, handle: Any, whole: DeviceProfile) -> DeviceProfile:
    """Return a MIG slice; compute rates scale with its multiprocessors, bandwidth with its memory."""
    total_bytes, free_bytes = _memory(nvml, handle)
    attributes = _maybe(nvml, nvml.nvmlDeviceGetAttributes, handle)
    num_cores = int(attributes.multiprocessorCount) if attributes is not None else 0
    cores_share = num_cores / whole.num_cores if num_cores and whole.num_cores else None
    memory_share = min(1.0, total_bytes / whole.total_bytes)
    return replace(
        whole,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(_maybe(nvml, nvml.nvmlDeviceGetName, handle) or f"{whole.name} MIG"),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        num_cores=num_cores,
        matmul_flops_per_s=_scaled(whole.matmul_flops_per_s, cores_share),
        memory_bytes_per_s=_scaled(whole.memory_bytes_per_s, memory_share),
        is_mig=True,
        processes=_processes(nvml, handle),
        link_bytes_per_s=None,  # slices cannot access one another's memory
    )


def _scaled(rate: float | None, share: float | None) -> float | None:
    return None if rate is None or share is None else rate * share


def _memory(nvml: ModuleType, handle: Any) -> tuple[int, int]:
    """Return total and free bytes; for unified memory (GB10, Jetson) the machine's, less a reserve."""
    memory = _maybe(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is None:
        host = profile_host()
        return host.total_bytes, max(0, host.free_bytes - unified_reserve_bytes(host.total_bytes))
    return int(memory.total), int(memory.free)


def temperature(nvml: ModuleType, handle: Any) -> int | None:
    """Return a GPU's temperature in degrees Celsius, None where the driver does not report it."""
    temperature_c: int | None = _maybe(
        nvml, nvml.nvmlDeviceGetTemperatureV, handle, nvml.NVML_TEMPERATURE_GPU
    )
    if temperature_c is None:  # drivers before 570 have only the older call
        temperature_c = _maybe(nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU)
    return temperature_c


class GpuWatch:
    """Temperature and throttling of some GPUs, polled by the process that uses them.

    Reads nothing where there is no NVIDIA driver or it does not answer: a run never fails because of it.
    """

    def __init__(self, uuids: Iterable[str], *, nvml: ModuleType | None = None) -> None:
        self._nvml = nvml if nvml is not None else importlib.import_module("pynvml")
        self._handles: list[Any] = []
        try:
            self._nvml.nvmlInit()  # not shut down before the process ends
            self._handles = [self._nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        except self._nvml.NVMLError:
            return

    def read(self) -> tuple[float | None, tuple[str, ...] | None]:
        """Return the highest temperature in degrees Celsius and why any of the GPUs is throttled."""
        if not self._handles:
            return None, None
        try:
            heat = [one for handle in self._handles if (one := temperature(self._nvml, handle)) is not None]
            reasons = {words for handle in self._handles for words in _throttle_reasons(self._nvml, handle)}
        except self._nvml.NVMLError:
            return None, None
        return float(max(heat)) if heat else None, tuple(sorted(reasons))


def _throttle_reasons(nvml: ModuleType, handle: Any) -> tuple[str, ...]:
    mask = _maybe(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    if mask is None:  # drivers before 535 have only the older name
        mask = _maybe(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    return tuple(
        words for name, words in _THROTTLING if (mask or 0) & getattr(nvml, f"nvmlClocksEventReason{name}")
    )


def _processes(nvml: ModuleType, handle: Any) -> tuple[DeviceProcess, ...]:
    """Return the compute and graphics processes on the device; the same process may be both."""
    found: dict[int, DeviceProcess] = {}
    for read in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in _maybe(nvml, read, handle) or ():
            used = process.usedGpuMemory
            found[process.pid] = DeviceProcess(
                pid=process.pid,
                name=_process_name(nvml, process.pid),
                used_bytes=None if used is None else int(used),
            )
    return tuple(found[pid] for pid in sorted(found))


def _process_name(nvml: ModuleType, pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:  # another user's on Windows, or in another container
        path = _maybe(nvml, nvml.nvmlSystemGetProcessName, pid)
        return re.split(r"[\\/]", _text(path))[-1] if path else "unknown"


def _visible(devices: Iterable[DeviceProfile], setting: str | None) -> tuple[DeviceProfile, ...]:
    """Return the devices that CUDA_VISIBLE_DEVICES shows, in its order.

    As in CUDA, entries are indices or beginnings of UUIDs, and the first invalid entry hides itself and all
    that follow.
    """
    devices = tuple(devices)
    if setting is None:
        return devices
    visible: list[DeviceProfile] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            found = [d for d in devices if d.index == int(entry)]
        else:
            found = [d for d in devices if entry and d.uuid.startswith(entry)]
        if not found:
            break
        visible += (d for d in found if d not in visible)
    return tuple(visible)


def _maybe(nvml: ModuleType, read: Callable[..., T], *arguments: object) -> T | None:
    """Return what the driver reports, or None where this device or driver does not support the call."""
    try:
        return read(*arguments)
    except (
        nvml.NVMLError_NotSupported,
        nvml.NVMLError_NotFound,
        nvml.NVMLError_NoPermission,
        nvml.NVMLError_FunctionNotFound,
        nvml.NVMLError_InvalidArgument,
        nvml.NVMLError_ArgumentVersionMismatch,
        nvml.NVMLError_Unknown,
    ):
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
