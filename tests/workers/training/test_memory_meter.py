"""A process measures its own peak and is held to its own share."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autosft.workers.training.memory_meter import MemoryMeter, resident_bytes

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
    MemoryMeter(on_cpu=False, cap_bytes=cap_gib * GIB)
    assert fractions == [expect]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_on_a_cpu_what_was_loaded_before_the_meter_counts_where_it_is_told_so() -> None:
    before = resident_bytes("VmRSS")
    held = np.ones(8 << 20)  # 64 MiB
    alone = MemoryMeter(on_cpu=True, cap_bytes=GIB)
    with_it = MemoryMeter(on_cpu=True, cap_bytes=GIB, baseline_bytes=before)
    assert (alone.peak()[0] or 0) < 32 << 20
    assert (with_it.peak()[0] or 0) > 60 << 20
    assert held[0] == 1.0
