"""A stand-in for pynvml: the calls that autosft makes, over GPUs described as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

MIB = 2**20


def error(code: int) -> Exception:
    """Return what pynvml raises for an NVML error code."""
    made: Exception = pynvml.NVMLError(code)
    return made


NOT_SUPPORTED = error(pynvml.NVML_ERROR_NOT_SUPPORTED)


@dataclass
class FakeGpu:
    """One GPU or MIG slice; an exception as a value is raised when it is asked for."""

    name: str = "NVIDIA GeForce RTX 4060 Laptop GPU"
    uuid: str = "GPU-1111"
    total_mib: int | Exception = 8188
    free_mib: int = 7600
    capability: tuple[int, int] | Exception = (8, 9)
    temperature: int | Exception = 45
    power_mw: int | Exception = 80_000
    reasons: int | Exception = pynvml.nvmlClocksEventReasonGpuIdle
    compute: Sequence[tuple[int, int | None]] | Exception = ()  # pid and bytes
    graphics: Sequence[tuple[int, int | None]] | Exception = ()
    slices: Sequence[FakeGpu | None] | None = None  # None: not in MIG mode
    num_sms: int = 0
    lost: Exception | None = None


def answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


@dataclass
class FakeNvml:
    """Answers as the driver would; everything that pynvml has beside these calls is pynvml's own."""

    gpus: Sequence[FakeGpu] = ()
    init_error: Exception | None = None
    cuda: int = 13000
    old_driver: bool = False  # knows none of the newer calls
    num_open: int = field(default=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name)  # constants and error classes

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.cuda

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.03"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        gpu = self.gpus[index]
        if gpu.lost is not None:
            raise gpu.lost
        return gpu

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        return next(gpu for gpu in self.gpus if gpu.uuid == uuid)

    def nvmlDeviceGetName(self, gpu: FakeGpu) -> str:
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetCudaComputeCapability(self, gpu: FakeGpu) -> Any:
        return answer(gpu.capability)

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(total=answer(gpu.total_mib) * MIB, free=gpu.free_mib * MIB)

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: FakeGpu) -> Any:
        return answer(gpu.power_mw)

    def nvmlDeviceGetTemperatureV(self, gpu: FakeGpu, sensor: int) -> Any:
        if self.old_driver:
            raise error(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return answer(gpu.temperature)

    def nvmlDeviceGetTemperature(self, gpu: FakeGpu, sensor: int) -> Any:
        return answer(gpu.temperature)

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: FakeGpu) -> Any:
        if self.old_driver:
            raise error(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return answer(gpu.reasons)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: FakeGpu) -> Any:
        return answer(gpu.reasons)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        return self._processes(gpu.compute)

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: FakeGpu) -> list[Any]:
        return self._processes(gpu.graphics)

    def _processes(self, processes: Sequence[tuple[int, int | None]] | Exception) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in answer(processes)]

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        return rf"C:\Windows\browser-{pid}.exe"

    def nvmlDeviceGetMigMode(self, gpu: FakeGpu) -> list[int]:
        if gpu.slices is None:
            raise NOT_SUPPORTED
        return [pynvml.NVML_DEVICE_MIG_ENABLE, pynvml.NVML_DEVICE_MIG_ENABLE]

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu: FakeGpu) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: FakeGpu, index: int) -> FakeGpu:
        part = gpu.slices[index] if gpu.slices is not None and index < len(gpu.slices) else None
        if part is None:
            raise error(pynvml.NVML_ERROR_NOT_FOUND)
        return part

    def nvmlDeviceGetAttributes(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(multiprocessorCount=gpu.num_sms)
