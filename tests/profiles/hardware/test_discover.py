"""Devices by NVML (a fake one), by psutil and control groups, by name and by file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import psutil
import pynvml
import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceKind
from autosft.profiles.hardware.discover import load_profile, profile_hardware, refresh, save_profile, select
from autosft.profiles.hardware.host import profile_host, unified_reserve_bytes
from autosft.profiles.hardware.known_devices import default_context_bytes, find_known_device, known_devices
from tests.profiles.hardware.fake_nvml import MIB, NOT_SUPPORTED, FakeGpu, FakeNvml, error


def auto(nvml: FakeNvml, visible: str | None = None) -> ClusterProfile:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return profile_hardware("auto", nvml=cast(ModuleType, nvml), environment=environment)


def a100(index: int, **given: Any) -> FakeGpu:
    values = {
        "name": "NVIDIA A100-SXM4-80GB",
        "uuid": f"GPU-a{index}00",
        "total_mib": 81920,
        "free_mib": 81000,
    }
    return FakeGpu(**(values | {"capability": (8, 0)} | given))


#: Cards whose memory is sold in other units than the driver counts in.
UNLIKE = {"B300"}
TWO_A100 = FakeNvml(gpus=[a100(0), a100(1, free_mib=30_000, compute=[(1, 50 * 2**30)])])
MIG_H100 = FakeNvml(
    gpus=[
        FakeGpu(
            name="NVIDIA H100 80GB HBM3",
            uuid="GPU-h100",
            total_mib=81559,
            free_mib=80000,
            capability=(9, 0),
            slices=[
                FakeGpu(name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", uuid="MIG-1", total_mib=40448, num_sms=60),
                None,
                FakeGpu(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", uuid="MIG-2", total_mib=9984, num_sms=16),
            ],
        )
    ]
)


# NVML


def test_laptop_with_a_desktop() -> None:
    me = psutil.Process()
    nvml = FakeNvml(
        gpus=[
            FakeGpu(
                free_mib=6900,
                graphics=[(me.pid, 300 * MIB), (999_999_999, None)],
                compute=[(me.pid, 400 * MIB)],
                reasons=pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle,
            )
        ]
    )
    cluster = auto(nvml)
    [gpu] = cluster.devices
    assert (gpu.total_bytes, gpu.free_bytes) == (8188 * MIB, 6900 * MIB)
    assert [(p.name, p.used_bytes) for p in gpu.processes] == [
        (me.name(), 300 * MIB),
        ("browser-999999999.exe", None),
    ]
    assert gpu.throttle_reasons == ("power limit",)
    assert gpu.power_limit_w == 80
    assert gpu.temperature_c == 45
    assert gpu.supports_bf16
    assert gpu.compute_capability == (8, 9)
    assert gpu.matmul_flops_per_s == 29.1e12  # from the table, by the driver's name
    assert not gpu.is_assumed
    assert (cluster.driver_version, cluster.cuda_version) == ("580.159.03", "13.0")
    assert nvml.num_open == 0


def test_two_gpus_and_what_is_visible() -> None:
    assert [d.index for d in auto(TWO_A100).devices] == [0, 1]
    assert [d.index for d in auto(TWO_A100, "1,0").devices] == [1, 0]
    assert [d.index for d in auto(TWO_A100, "GPU-a1").devices] == [1]
    assert [d.index for d in auto(TWO_A100, "0,7,1").devices] == [0]  # as CUDA: ends at the first unknown
    assert auto(TWO_A100).devices[1].free_bytes == 30_000 * MIB


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_leave_the_cpu_and_a_note(visible: str) -> None:
    cluster = auto(TWO_A100, visible)
    assert [d.kind for d in cluster.devices] == [DeviceKind.CPU]
    assert cluster.notes == ("CUDA_VISIBLE_DEVICES hides all 2 GPUs of this machine.",)


def test_mig_slices_are_devices() -> None:
    first, second = auto(MIG_H100).devices
    assert (first.uuid, second.uuid) == ("MIG-1", "MIG-2")
    assert first.is_mig
    assert first.total_bytes == 40448 * MIB
    assert first.compute_capability == (9, 0)
    assert first.matmul_flops_per_s == pytest.approx(989.4e12 * 60 / 132)
    assert second.memory_bytes_per_s == pytest.approx(3.35e12 * 9984 / 81559)
    assert [d.uuid for d in auto(MIG_H100, "MIG-2").devices] == ["MIG-2"]


@pytest.mark.parametrize(
    "code",
    [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED],
    ids=["library", "driver"],
)
def test_no_driver_means_cpu(code: int) -> None:
    cluster = auto(FakeNvml(init_error=error(code)))
    assert [d.kind for d in cluster.devices] == [DeviceKind.CPU]
    assert cluster.notes == ()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_NO_PERMISSION, "/dev/nvidia"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine"),
        (pynvml.NVML_ERROR_UNKNOWN, "nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_answer_is_reported(code: int, words: str) -> None:
    with pytest.raises(UserError, match="does not answer") as caught:
        auto(FakeNvml(init_error=error(code)))
    assert words in (caught.value.remedy or "")
    assert "--hardware cpu" in (caught.value.remedy or "")


def test_one_lost_gpu_does_not_lose_the_other() -> None:
    cluster = auto(FakeNvml(gpus=[a100(0, lost=error(pynvml.NVML_ERROR_GPU_IS_LOST)), a100(1)]))
    assert [d.index for d in cluster.devices] == [1]
    assert cluster.notes[0].startswith("GPU 0 cannot be used")


def test_unified_memory_counts_the_machines_ram() -> None:
    cluster = auto(FakeNvml(gpus=[FakeGpu(name="NVIDIA Thor", total_mib=NOT_SUPPORTED, capability=(12, 1))]))
    [gpu] = cluster.devices
    assert gpu.total_bytes == profile_host().total_bytes
    assert 0 < gpu.free_bytes <= gpu.total_bytes
    assert gpu.matmul_flops_per_s is None  # not in the table: unknown, not guessed


def test_what_a_driver_does_not_say_is_none() -> None:
    silent = FakeGpu(
        name="NVIDIA Something 9999",
        temperature=NOT_SUPPORTED,
        power_mw=NOT_SUPPORTED,
        reasons=NOT_SUPPORTED,
        compute=error(pynvml.NVML_ERROR_NO_PERMISSION),
        graphics=NOT_SUPPORTED,
        capability=(7, 5),
    )
    [gpu] = auto(FakeNvml(gpus=[silent])).devices
    assert (gpu.temperature_c, gpu.power_limit_w, gpu.throttle_reasons, gpu.processes) == (None, None, (), ())
    assert not gpu.supports_bf16


def test_an_old_driver_is_read_by_its_older_calls() -> None:
    hot = FakeGpu(reasons=pynvml.nvmlClocksEventReasonHwThermalSlowdown)
    [gpu] = auto(FakeNvml(gpus=[hot], old_driver=True, cuda=11040)).devices
    assert gpu.temperature_c == 45
    assert gpu.throttle_reasons == ("too hot (hardware)",)
    assert gpu.context_bytes > 1000 * MIB  # before CUDA 11.7 every kernel is loaded


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from autosft.profiles.hardware.discover import profile_hardware;"
        "profile_hardware('cpu');"
        "profile_hardware('L40S'); assert not {'torch', 'ray', 'optuna'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Refresh and select


def test_refresh_reads_free_memory_again_and_names_lost_devices() -> None:
    before = auto(TWO_A100)
    later = FakeNvml(gpus=[a100(0, free_mib=5_000, temperature=88)])
    after = refresh(before, nvml=cast(ModuleType, later))
    assert [(d.index, d.free_bytes, d.temperature_c) for d in after.devices] == [(0, 5_000 * MIB, 88)]
    assert after.notes == ("GPU 1 (NVIDIA A100-SXM4-80GB) no longer answers.",)
    with pytest.raises(UserError, match="no longer answers"):
        refresh(before, nvml=cast(ModuleType, FakeNvml()))


def test_refresh_leaves_assumed_devices_alone() -> None:
    cluster = profile_hardware("2xL40S")
    assert refresh(cluster, nvml=cast(ModuleType, FakeNvml())) == cluster


def test_refresh_of_the_cpu() -> None:
    cluster = profile_hardware("cpu")
    stale = replace(cluster, devices=(replace(cluster.devices[0], free_bytes=1),))
    assert refresh(stale).devices[0].free_bytes > 1


def test_select_by_index_slice_and_uuid() -> None:
    four = profile_hardware("4xA100-80GB")
    assert [d.index for d in select(four, "2,3").devices] == [2, 3]
    assert [d.index for d in select(four, " 3 , 0").devices] == [3, 0]
    mig = auto(MIG_H100)
    assert [d.uuid for d in select(mig, "0:1").devices] == ["MIG-2"]
    assert [d.uuid for d in select(mig, "0").devices] == ["MIG-1", "MIG-2"]
    assert [d.uuid for d in select(mig, "MIG-1").devices] == ["MIG-1"]


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ("4", "no device '4'"),
        ("x", "no device 'x'"),
        ("1,1", "twice"),
        ("0,,1", "empty entry"),
        ("0:0", "0:0"),
    ],
)
def test_select_refuses(gpus: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        select(profile_hardware("4xL4"), gpus)


def test_select_takes_no_cpu_for_a_gpu() -> None:
    with pytest.raises(UserError, match="no GPU here"):
        select(profile_hardware("cpu"), "0")


# The CPU and control groups


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GROUPS = {
    "version 2": {
        "proc/self/cgroup": "0::/user.slice/job\n",
        "sys/fs/cgroup/user.slice/job/memory.max": "2147483648\n",
        "sys/fs/cgroup/user.slice/job/memory.current": "1073741824\n",
        "sys/fs/cgroup/user.slice/job/memory.stat": "anon 1\ninactive_file 536870912\n",
        "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user.slice/cpu.max": "150000 100000\n",
    },
    "version 1": {
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1073741824\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 536870912\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    },
}


@pytest.mark.parametrize("version", GROUPS)
def test_control_groups_limit_memory_and_cores(version: str, tmp_path: Path) -> None:
    host = profile_host(root=write(tmp_path, GROUPS[version]))
    assert host.total_bytes == 2 * 2**30
    assert host.free_bytes == pytest.approx(1.5 * 2**30)
    assert host.num_cores == 1  # 1.5 cores hold one thread


@pytest.mark.parametrize(
    "files",
    [
        {},
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/cpu.max": "max 1\n",
        },
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        },
    ],
    ids=["none", "version 2, no limit", "version 1, no limit"],
)
def test_without_limits_the_machine_counts(files: dict[str, str], tmp_path: Path) -> None:
    host = profile_host(root=write(tmp_path, files))
    assert host.total_bytes == psutil.virtual_memory().total
    assert host.num_cores >= 1


# The table of known devices


def test_every_row_is_complete_and_sourced() -> None:
    for row in known_devices():
        assert {"rates", "matmul_share", "links", "memory"} <= dict(row.sources).keys(), row.name
        assert all(len(source) > 8 for _, source in row.sources), row.name
        if row.is_unified:
            left = row.total_bytes - row.usable_bytes
            assert left == pytest.approx(unified_reserve_bytes(row.total_bytes), abs=MIB), row.name
        else:
            assert 0.9 < row.usable_bytes / row.total_bytes < 1, row.name
        assert 0.93 < row.total_bytes / MIB / 1024 / row.memory_gb <= 1.0 or row.name in UNLIKE, row.name
        assert 0.3 < row.matmul_share <= 1, row.name
        # Tensor cores do 256 to 8192 operations an SM and cycle, at 1 to 3 GHz.
        assert 256e9 < row.matmul_flops_per_s / row.num_sms < 24_576e9, row.name


@pytest.mark.parametrize(
    ("spec", "count", "name"),
    [
        ("L40S", 1, "L40S"),
        ("l40s", 1, "L40S"),
        ("2xA100-80GB", 2, "A100-80GB"),
        ("4 x rtx 3090", 4, "RTX-3090"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 1, "RTX-4060-Laptop"),
        ("8xH100", 8, "H100-80GB"),
        ("Tesla T4", 1, "T4"),
        ("rtx 2080 ti", 1, "RTX-2080-Ti"),
        ("4090 mobile", 1, "RTX-4090-Laptop"),
        ("DGX Spark", 1, "GB10"),
        ("RTX PRO 6000", 1, "RTX-PRO-6000"),
        ("24GB", 1, "A10G"),
        ("2 x 80 gib", 2, "H100-PCIe"),
    ],
)
def test_names(spec: str, count: int, name: str) -> None:
    devices = profile_hardware(spec).devices
    assert [d.name for d in devices] == [name] * count
    assert len({d.uuid for d in devices}) == count
    assert all(d.is_assumed and d.free_bytes < d.total_bytes for d in devices)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("L45", "Nearest: L4, L40"),
        ("7GB", r"(?s)no known card has 7 GB.*Known sizes: 4, 6, 8, 10, 11, 12, 16"),
        ("RTX-4091", "RTX-4090"),
        ("A100", "several devices: A100-40GB, A100-80GB"),
        ("0xL4", "outside 1 to 1024"),
        ("", "empty"),
        ("warp drive", "neither a known device nor a file"),
    ],
)
def test_unknown_names(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        profile_hardware(spec)


def test_a_size_names_the_card_that_it_stands_for() -> None:
    [note] = profile_hardware("24GB").notes
    assert note.startswith("24 GB: planned for A10G, the one with the least usable memory of that size")
    assert profile_hardware("11GB").notes == ("11 GB: planned for RTX-2080-Ti.",)
    assert profile_hardware("A10G").notes == ()


def test_a_name_of_the_driver_belongs_to_cards_of_one_chip() -> None:
    rows: dict[str, set[int]] = {}
    for row in known_devices():
        for name in row.nvml_names:
            rows.setdefault(name, set()).add(row.num_sms)
    several = {name for name, sms in rows.items() if len(sms) > 1}
    assert several == {"NVIDIA GeForce RTX 2060", "NVIDIA GeForce RTX 3080"}  # sold with two chips


def test_a_gpu_of_the_machines_ram_leaves_some_to_the_host() -> None:
    spark = FakeNvml(gpus=[FakeGpu(name="NVIDIA GB10", total_mib=NOT_SUPPORTED, capability=(12, 1))])
    [device] = auto(spark).devices
    host = profile_host()
    assert device.total_bytes == host.total_bytes
    assert device.free_bytes <= host.total_bytes - unified_reserve_bytes(host.total_bytes)


def test_context_hangs_on_the_drivers_era() -> None:
    assert default_context_bytes((8, 0), "11.4") > 1000 * MIB
    assert default_context_bytes((8, 0), "13.0") < 500 * MIB
    assert default_context_bytes((9, 0), None) > default_context_bytes((7, 5), None)
    assert find_known_device("t4").compute_capability == (7, 5)


# Files


def test_saved_profiles_come_back(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    for cluster in (auto(MIG_H100), auto(TWO_A100), profile_hardware("cpu"), profile_hardware("2xT4")):
        save_profile(cluster, path)
        assert load_profile(path) == cluster
        assert profile_hardware(str(path)) == cluster


def test_a_profile_of_another_machine_is_assumed(tmp_path: Path) -> None:
    cluster = auto(TWO_A100)
    elsewhere = replace(cluster, devices=tuple(replace(d, node="far") for d in cluster.devices))
    save_profile(elsewhere, tmp_path / "far.json")
    assert all(d.is_assumed for d in load_profile(tmp_path / "far.json").devices)


def broken(**changes: Any) -> str:
    document: dict[str, Any] = {
        "format": "autosft hardware profile 1",
        "driver_version": None,
        "cuda_version": None,
    }
    return json.dumps(document | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "not a hardware profile"),
        ('{"model": "llama"}', "not a hardware profile"),
        (broken(), "damaged"),
        (broken(devices=[]), "lists no device"),
        (broken(devices=[{"uuid": 3}]), "damaged"),
        (broken(devices=[{"total_bytes": math.inf}]), "damaged"),
        ("\udcff", "cannot be read"),
    ],
)
def test_broken_files(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=words):
        profile_hardware(str(path))


def test_a_missing_file_is_reported() -> None:
    with pytest.raises(UserError, match="no such file"):
        profile_hardware("nowhere.json")


def test_a_cpu_counts_as_several_devices_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from autosft.profiles.hardware import host

    whole = replace(profile_host(), num_cores=5, total_bytes=10_001, free_bytes=8_001)
    monkeypatch.setattr(host, "profile_host", lambda: whole)
    parts = profile_hardware("2xCPU")
    assert [
        (device.num_cores, device.total_bytes, device.free_bytes, device.index) for device in parts.devices
    ] == [
        (2, 5_000, 4_000, 0),
        (2, 5_000, 4_000, 1),
    ]
    assert len({device.uuid for device in parts.devices}) == 2
    assert len({device.name for device in parts.devices}) == 1
    assert [device.free_bytes for device in refresh(parts).devices] == [5_000, 5_000]
    assert select(parts, "1").devices == parts.devices[1:]
    with pytest.raises(UserError, match="this machine has 5 cores"):
        profile_hardware("6xcpu")
