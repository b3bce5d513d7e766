"""Measured rates: remembered, merged, and refused with one message."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware import benchmark
from autosft.profiles.hardware.benchmark import (
    MeasuredRates,
    measure,
    measure_all_reduce,
    measure_cluster,
    unmeasured,
    with_measured_rates,
)
from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.hardware.discover import profile_hardware

RATES = MeasuredRates(
    matmul_flops_per_s=1e11,
    memory_bytes_per_s=2e10,
    context_bytes=7,
    host_link_bytes_per_s=None,
    link_bytes_per_s=None,
)


def test_rates_are_remembered_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: RATES)
    cpu = profile_hardware("cpu")
    assert with_measured_rates(cpu, cache=tmp_path) == cpu  # measures nothing of itself
    [device] = measure_cluster(cpu, cache=tmp_path).devices
    assert device.rates_measured
    assert (device.matmul_flops_per_s, device.memory_bytes_per_s, device.context_bytes) == (1e11, 2e10, 7)
    assert with_measured_rates(cpu, cache=tmp_path).devices == (device,)


def test_another_driver_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: RATES)
    cpu = profile_hardware("cpu")
    measure_cluster(cpu, cache=tmp_path)
    assert (
        not with_measured_rates(replace(cpu, driver_version="999"), cache=tmp_path).devices[0].rates_measured
    )


def test_assumed_devices_are_never_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> MeasuredRates:
        pytest.fail("an assumed device was measured")

    monkeypatch.setattr(benchmark, "measure", refuse)
    cluster = profile_hardware("2xL40S")
    assert measure_cluster(cluster, cache=tmp_path) == cluster


def test_gpus_of_a_node_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def all_reduce(_: DeviceKind, uuids: Sequence[str]) -> float:
        asked.append(list(uuids))
        return 8e9

    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: RATES)
    monkeypatch.setattr(benchmark, "measure_all_reduce", all_reduce)
    gpu = replace(profile_hardware("cpu").devices[0], kind=DeviceKind.CUDA, uuid="GPU-0", name="L4")
    several = replace(
        profile_hardware("cpu"),
        devices=(gpu, replace(gpu, uuid="GPU-1"), replace(gpu, uuid="MIG-2", is_mig=True)),
    )
    first, second, slice_ = measure_cluster(several, cache=tmp_path).devices
    assert asked == [["GPU-0", "GPU-1"]]
    assert (first.all_reduce_bytes_per_s, second.all_reduce_bytes_per_s) == (8e9, 8e9)
    assert slice_.all_reduce_bytes_per_s is None
    alone = replace(several, devices=(gpu,))
    assert measure_cluster(alone, cache=tmp_path / "alone").devices[0].all_reduce_bytes_per_s is None


def test_only_devices_of_this_machine_without_rates_are_unmeasured() -> None:
    cpu = profile_hardware("cpu")
    assert unmeasured(cpu) == cpu.devices
    assert unmeasured(replace(cpu, devices=(replace(cpu.devices[0], rates_measured=True),))) == ()
    assert unmeasured(profile_hardware("2xL40S")) == ()


def test_a_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "measured_rates.json").write_text("{")
    cpu = profile_hardware("cpu")
    assert with_measured_rates(cpu, cache=tmp_path) == cpu


def test_an_unwritable_cache_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "measure", lambda *_, **__: RATES)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be saved"):
        measure_cluster(profile_hardware("cpu"), cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (
            subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no kernel image"),
            "no kernel image",
        ),
        (subprocess.TimeoutExpired([], 1), "not measured within"),
    ],
    ids=["fails", "hangs"],
)
def test_a_failed_measurement_is_one_message(
    outcome: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=words):
        measure(profile_hardware("cpu").devices[0])


@pytest.mark.slow
def test_an_all_reduce_is_really_measured() -> None:
    assert 1e6 < measure_all_reduce(DeviceKind.CPU, ["CPU-0", "CPU-1"]) < 1e12


@pytest.mark.slow
def test_the_cpu_is_really_measured() -> None:
    rates = measure(profile_hardware("cpu").devices[0])
    assert 1e8 < rates.matmul_flops_per_s < 1e15
    assert 1e7 < rates.memory_bytes_per_s < 1e14
    assert rates.context_bytes == 0
