"""What kinds of devices do differently for a trial."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autosft.studies.trial import FailureKind
from autosft.workers.device import CPU, CUDA, TrialDevice, resident_bytes

GIB = 1 << 30


@pytest.mark.parametrize(("cap_gib", "expect"), [(6, 0.25), (24, 1.0), (30, 1.0)])
def test_on_a_gpu_torch_is_held_to_the_share_of_the_trial(
    monkeypatch: pytest.MonkeyPatch, cap_gib: int, expect: float
) -> None:
    fractions: list[float] = []
    card = SimpleNamespace(total_memory=24 * GIB)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    CUDA.meter(cap_gib * GIB)
    assert fractions == [expect]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_on_a_cpu_what_was_loaded_before_the_meter_counts_where_it_is_told_so() -> None:
    before = resident_bytes("VmRSS")
    held = np.ones(8 << 20)  # 64 MiB
    alone = CPU.meter(GIB)
    with_it = CPU.meter(GIB, baseline_bytes=before)
    assert (alone.peak()[0] or 0) < 32 << 20
    assert (with_it.peak()[0] or 0) > 60 << 20
    assert held[0] == 1.0


@pytest.mark.parametrize(
    ("device", "visible", "watched", "failure"),
    [
        (CPU, "", (), FailureKind.OUT_OF_MEMORY),
        (CUDA, "GPU-a,GPU-b", ("GPU-a", "GPU-b"), FailureKind.HOST_OUT_OF_MEMORY),
    ],
)
def test_a_process_sees_and_watches_its_own_gpus_and_no_others(
    device: TrialDevice, visible: str, watched: tuple[str, ...], failure: FailureKind
) -> None:
    assert device.environment(["GPU-a", "GPU-b"])["CUDA_VISIBLE_DEVICES"] == visible
    assert device.watched(["GPU-a", "GPU-b"]) == watched
    assert device.host_allocation_failure is failure


def test_expandable_segments_are_set_with_a_warning_if_they_do_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: ",".join(told))
    for expands in (True, False):
        monkeypatch.setattr(
            torch.cuda, "memory_snapshot", lambda expands=expands: [{"is_expandable": expands}]
        )
        CUDA.set_allocator()
        assert bool(CUDA.allocator_warning()) is (not expands and sys.platform == "linux")
    assert CPU.allocator_warning() == ""
