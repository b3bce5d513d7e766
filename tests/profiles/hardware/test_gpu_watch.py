"""Temperature and throttling beside measurements, and nothing where no driver answers."""

from __future__ import annotations

from typing import Any

import pynvml
import pytest

from autosft.profiles.hardware.nvml import GpuWatch
from tests.profiles.hardware.fake_nvml import NOT_SUPPORTED, FakeGpu, FakeNvml, error

HOT = FakeGpu(uuid="GPU-hot", temperature=83, reasons=pynvml.nvmlClocksEventReasonSwThermalSlowdown)
COOL = FakeGpu(uuid="GPU-cool", temperature=45)
SILENT = FakeGpu(uuid="GPU-silent", temperature=NOT_SUPPORTED, reasons=NOT_SUPPORTED)
LOST = FakeGpu(uuid="GPU-lost", temperature=error(pynvml.NVML_ERROR_GPU_IS_LOST))

CASES: dict[str, tuple[list[FakeGpu], Any]] = {
    "one that is cool": ([COOL], (45.0, ())),
    "the hottest of two": ([COOL, HOT], (83.0, ("too hot (driver)",))),
    "one that does not say": ([SILENT], (None, ())),
    "one that has fallen off the bus": ([LOST], (None, None)),
    "none": ([], (None, None)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_of_gpus(case: str) -> None:
    gpus, said = CASES[case]
    nvml: Any = FakeNvml(gpus=gpus)
    assert GpuWatch([gpu.uuid for gpu in gpus], nvml=nvml).read() == said


def test_without_a_driver_nothing_is_read() -> None:
    nvml: Any = FakeNvml(init_error=error(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert GpuWatch(["GPU-hot"], nvml=nvml).read() == (None, None)
