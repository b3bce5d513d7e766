"""The doctor: what it reads, and each finding with its twin where all is well."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from autosft.profiles.hardware import machine as machine_module
from autosft.profiles.hardware.busy import busy_notes, describe_load, num_free_cores
from autosft.profiles.hardware.device import ClusterProfile, DeviceProcess
from autosft.profiles.hardware.doctor import examine, several_gpus
from autosft.profiles.hardware.findings import Finding, Level
from autosft.profiles.hardware.machine import (
    Link,
    Machine,
    TorchBuild,
    is_in_use,
    power_modes,
    probe_torch,
    read_links,
    read_machine,
    shared_memory,
)
from tests.profiles.hardware.fake_nvml import FakeGpu, FakeNvml
from tests.scheduler.devices import GIB, gpu

GOOD_TORCH = TorchBuild(
    version="2.13.0",
    cuda_build="13.0",
    sees_cuda=True,
    allocator="native",
    allocator_settings="expandable_segments:True",
    has_expandable_segments=True,
)


BROKEN_TORCH = TorchBuild(version=None, cuda_build=None, sees_cuda=False, error="no libc")
PCIE = Link(first=0, second=1, num_nvlinks=0, path="across CPU sockets", has_peer_access=True)


def laptop(**changes: Any) -> Any:
    free = {"total_bytes": 8 * GIB, "free_bytes": 8 * GIB - (200 << 20), "temperature_c": 50.0}
    return replace(gpu(), **{**free, **changes})


def machine(device: Any = None, **changes: Any) -> Machine:
    """A machine on which all is well."""
    fields: dict[str, Any] = {
        "system": "Linux",
        "python": "3.11.7",
        "cluster": ClusterProfile(devices=(device or laptop(),), driver_version="580", cuda_version="13.0"),
        "cluster_error": None,
        "torch": GOOD_TORCH,
        "ram_total_bytes": 32 * GIB,
        "ram_free_bytes": 20 * GIB,
        "disks": (("/data", 100 * GIB),),
        "shared_memory_bytes": 8 * GIB,
        "on_battery": False,
        "power_modes": (("platform profile", "performance"),),
        "environment": {},
        "ports_in_use": (),
        "links": (),
        "missing_parts": (),
        "has_punkt": True,
    }
    return Machine(**{**fields, **changes})


def test_a_good_machine_has_nothing_to_do() -> None:
    found = examine(machine())
    assert {item.level for item in found} == {Level.OK}
    assert not any(item.remedy for item in found)
    assert {"driver", "torch", "GPU 0", "allocator", "RAM", "disk", "power"} <= {item.topic for item in found}


BROWSER = DeviceProcess(pid=77, name="browser", used_bytes=2 * GIB)
CASES = [
    (
        "driver that does not answer",
        {"cluster": None, "cluster_error": ("mismatch", "restart")},
        Level.PROBLEM,
        "mismatch",
    ),
    ("CPU build beside a GPU", {"torch": replace(GOOD_TORCH, cuda_build=None)}, Level.PROBLEM, "CPU build"),
    (
        "torch newer than the driver",
        {"torch": replace(GOOD_TORCH, cuda_build="14.1")},
        Level.PROBLEM,
        "up to 13.0",
    ),
    (
        "torch that sees no GPU",
        {"torch": replace(GOOD_TORCH, sees_cuda=False, error="boom")},
        Level.PROBLEM,
        "boom",
    ),
    ("broken torch", {"torch": BROKEN_TORCH}, Level.PROBLEM, "no libc"),
    (
        "a browser on the GPU",
        {"device": laptop(free_bytes=5 * GIB, processes=(BROWSER,))},
        Level.WARNING,
        "browser (process 77, 2.0 GiB)",
    ),
    ("hot", {"device": laptop(temperature_c=88.0)}, Level.WARNING, "88 °C"),
    ("throttled", {"device": laptop(throttle_reasons=("too hot (driver)",))}, Level.WARNING, "too hot"),
    (
        "segments asked for in vain",
        {
            "torch": replace(GOOD_TORCH, has_expandable_segments=False),
            "environment": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        },
        Level.WARNING,
        "not in use",
    ),
    (
        "the guide's split size",
        {"environment": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}},
        Level.NOTE,
        "max_split_size_mb",
    ),
    (
        "launch blocking left on",
        {"environment": {"CUDA_LAUNCH_BLOCKING": "1"}},
        Level.WARNING,
        "every kernel launch waits",
    ),
    ("little RAM", {"ram_free_bytes": GIB}, Level.WARNING, "1.0 GiB free"),
    ("full disk", {"disks": (("/data", GIB),)}, Level.WARNING, "/data"),
    ("a container's shared memory", {"shared_memory_bytes": 64 << 20}, Level.WARNING, "64 MiB"),
    ("battery", {"on_battery": True}, Level.WARNING, "battery"),
    ("quiet mode", {"power_modes": (("platform profile", "low-power"),)}, Level.WARNING, "low-power"),
    ("no NVLink", {"links": (PCIE,)}, Level.WARNING, "across CPU sockets"),
    ("a forgotten Ray", {"ports_in_use": (6379,)}, Level.NOTE, "6379"),
    ("no punkt", {"has_punkt": False}, Level.NOTE, "punkt_tab"),
    ("Windows", {"system": "Windows"}, Level.WARNING, "not been tested"),
]


@pytest.mark.parametrize(("name", "changes", "level", "words"), CASES, ids=[case[0] for case in CASES])
def test_findings(name: str, changes: dict[str, Any], level: Level, words: str) -> None:
    found = [item for item in examine(machine(**changes)) if item.level is not Level.OK]
    assert len(found) == 1, found
    assert found[0].level is level
    assert words in found[0].message
    assert found[0].remedy or level is Level.NOTE


def test_launch_blocking_switched_off_is_as_good_as_unset() -> None:
    assert not [
        item
        for item in examine(machine(environment={"CUDA_LAUNCH_BLOCKING": "0"}))
        if item.level is not Level.OK
    ]


def causes(*devices: Any, links: tuple[Link, ...] = ()) -> list[Finding]:
    return list(several_gpus(devices, links))


def test_why_several_gpus_are_slower() -> None:
    fast = laptop(index=0, link_bytes_per_s=250e9, matmul_flops_per_s=1e14)
    assert [cause.level for cause in causes(fast, replace(fast, index=1))] == [Level.OK]
    pcie = [replace(fast, index=at, link_bytes_per_s=10e9) for at in (0, 1, 2, 3)]
    [slow] = causes(*pcie)
    assert "10.0 GB/s" in slow.message
    assert "0.60 s a step" in slow.message  # 2 x 3/4 x 4 GB over 10 GB/s
    shared = [fast, replace(fast, index=1, processes=(BROWSER,))]
    assert "other processes run on GPU 1" in causes(*shared)[0].message
    unlike = [fast, replace(fast, index=1, matmul_flops_per_s=5e13)]
    assert "GPU 1 computes at 50 %" in causes(*unlike)[0].message.replace("50%", "50 %")
    unmeasured = [replace(item, link_bytes_per_s=None) for item in shared[:1] * 2]
    assert causes(*unmeasured)[0].level is Level.NOTE


class LinkedNvml(FakeNvml):
    """Two GPUs with one NVLink to each other and one to a switch."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        return next(item for item in self.gpus if item.uuid == uuid)

    def nvmlDeviceGetPciInfo(self, gpu: FakeGpu) -> Any:
        return SimpleNamespace(busId=gpu.uuid)

    def nvmlDeviceGetNvLinkState(self, gpu: FakeGpu, link: int) -> int:
        if link > 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return int(link < 2)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, gpu: FakeGpu, link: int) -> Any:
        return SimpleNamespace(busId="GPU-b" if link == 0 else "switch")

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, gpu: FakeGpu, link: int) -> int:
        return int(pynvml.NVML_NVLINK_DEVICE_TYPE_GPU if link == 0 else pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH)

    def nvmlDeviceGetTopologyCommonAncestor(self, one: FakeGpu, other: FakeGpu) -> int:
        return int(pynvml.NVML_TOPOLOGY_SYSTEM)

    def nvmlDeviceGetP2PStatus(self, one: FakeGpu, other: FakeGpu, kind: int) -> int:
        return int(pynvml.NVML_P2P_STATUS_OK)


def test_links_are_read_from_the_driver() -> None:
    nvml = LinkedNvml(gpus=[FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b")])
    devices = [replace(gpu(), uuid=uuid, index=at) for at, uuid in enumerate(("GPU-a", "GPU-b"))]
    [link] = read_links(devices, nvml=nvml)  # type: ignore[arg-type]
    assert link == Link(first=0, second=1, num_nvlinks=2, path="across CPU sockets", has_peer_access=True)
    assert nvml.num_open == 0
    assert read_links(devices[:1], nvml=nvml) == []  # type: ignore[arg-type]


def test_what_the_system_shows(tmp_path: Path) -> None:
    assert power_modes(tmp_path) == []
    assert shared_memory(tmp_path) is None
    profile = tmp_path / "sys/firmware/acpi/platform_profile"
    profile.parent.mkdir(parents=True)
    profile.write_text("low-power\n")
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert power_modes(tmp_path) == [("platform profile", "low-power")]
    assert shared_memory(tmp_path) is not None


def test_ports() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert not is_in_use(port)
        listener.listen()
        assert is_in_use(port)


def test_a_driver_that_does_not_answer_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "probe_torch", lambda: GOOD_TORCH)
    broken = FakeNvml(init_error=pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    read = read_machine(nvml=broken, root=tmp_path, environment={"CUDA_LAUNCH_BLOCKING": "1"})  # type: ignore[arg-type]
    assert read.environment == {"CUDA_LAUNCH_BLOCKING": "1"}
    problems = [item for item in examine(read) if item.level is Level.PROBLEM]
    assert [problem.topic for problem in problems] == ["driver"]
    assert "restart" in problems[0].remedy


@pytest.mark.slow
def test_torch_is_asked_in_a_process_of_its_own() -> None:
    import torch

    told = probe_torch()
    assert (told.version, told.cuda_build) == (torch.__version__, torch.version.cuda)
    assert told.error == "" or told.cuda_build


def test_what_slows_a_gpu_down_is_said_before_a_study_starts() -> None:
    hot = replace(
        gpu(),
        is_assumed=False,
        temperature_c=91,
        throttle_reasons=("hardware slowdown", "power limit"),
        processes=(DeviceProcess(pid=7, name="game", used_bytes=None),),
    )
    throttled, shared = busy_notes([hot], load=99.0)
    assert "slows itself down at 91 °C (hardware slowdown)" in throttled
    assert "is used by game (7) too" in shared
    idle = replace(hot, throttle_reasons=("power limit",), processes=())
    assert busy_notes([idle, replace(hot, is_assumed=True)], load=99.0) == ()


LOADS = [
    (0.1, 2, ""),
    (3.9, 2, "3.9 programs at work on 2 cores"),
    (0.5, 1, "on 1 core"),
    (None, 2, ""),
    (9.0, 0, ""),
]


@pytest.mark.parametrize(("load", "num_cores", "said"), LOADS)
def test_a_busy_processor_is_said(load: float | None, num_cores: int, said: str) -> None:
    words = describe_load(load, num_cores)
    assert said in words
    assert bool(words) == bool(said)
    found = [item for item in examine(machine(load=load, num_cores=num_cores)) if item.topic == "load"]
    assert [item.level for item in found] == [Level.WARNING] * bool(said)


@pytest.mark.parametrize(
    ("load", "num_cores", "expected"),
    [(None, 8, 8), (0.0, 8, 8), (0.4, 2, 2), (1.0, 2, 1), (3.2, 8, 5), (15.0, 8, 1), (0.0, 1, 1)],
)
def test_how_many_cores_others_leave(load: float | None, num_cores: int, expected: int) -> None:
    assert num_free_cores(load, num_cores) == expected
