"""Read what matters of a machine besides its devices: torch's build, allocator, disks, power, links, ports.

`autosft.profiles.hardware.doctor` interprets it.  torch is queried in a separate process
(`autosft.profiles.hardware.torch_probe`), so that a broken build cannot crash this one and CUDA stays
untouched.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from autosft.profiles.child_python import python
from autosft.profiles.dataset.ifeval_prompts import has_punkt
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.busy import load_now
from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile
from autosft.profiles.hardware.discover import profile_hardware, select

#: Ports that a Ray cluster listens on, and their purposes.
RAY_PORTS = {6379: "the head's address", 8265: "the dashboard and jobs", 10001: "Ray clients"}
#: Environment variables that change how trials run.
VARIABLES = (
    "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "CUDA_VISIBLE_DEVICES",
    "NCCL_P2P_DISABLE",
    "RAY_ADDRESS",
)
OPTIONAL_PARTS = {"eval": "lm_eval", "gpu": "bitsandbytes", "postgres": "psycopg"}
_PROBE_TIMEOUT_S = 120
_P2P_READ = 0  # pynvml 13 has NVML_P2P_CAPS_INDEX_READ as the tuple (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """torch's build as a separate process reports it; `error` is set where torch cannot be imported."""

    version: str | None
    cuda_build: str | None  # None for a CPU build
    sees_cuda: bool
    error: str = ""
    #: The allocator's backend, "native" or "cudaMallocAsync"; None without a GPU.
    allocator: str | None = None
    allocator_settings: str | None = None  # the settings it has parsed
    has_expandable_segments: bool | None = None  # whether a new segment is expandable


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The link between two GPUs, given by index."""

    first: int
    second: int
    num_nvlinks: int | None  # active ones; None where the driver does not report it
    path: str | None  # the path without NVLink: "one PCIe switch", "across CPU sockets", ...
    has_peer_access: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Everything that `doctor` checks."""

    system: str  # "Linux", "Windows", "Darwin"
    python: str
    cluster: ClusterProfile | None
    cluster_error: tuple[str, str] | None  # message and remedy of a driver that does not answer
    torch: TorchBuild
    ram_total_bytes: int
    ram_free_bytes: int
    disks: tuple[tuple[str, int], ...]  # folder and bytes free on its disk
    shared_memory_bytes: int | None  # free in /dev/shm
    on_battery: bool | None
    power_modes: tuple[tuple[str, str], ...]  # (what, mode): ("platform profile", "low-power")
    environment: Mapping[str, str]  # those of VARIABLES that are set
    ports_in_use: tuple[int, ...]  # among RAY_PORTS
    links: tuple[Link, ...]
    missing_parts: tuple[str, ...]  # among OPTIONAL_PARTS
    has_punkt: bool | None  # None without NLTK
    load: float | None = None  # programs that want a core, over the last minute
    num_cores: int = 0


def read_machine(
    *,
    gpus: str | None = None,
    folders: Sequence[Path] = (),
    nvml: ModuleType | None = None,
    root: Path = Path("/"),
    environment: Mapping[str, str] | None = None,
) -> Machine:
    """Read this machine.

    `gpus` selects GPUs as `--gpus` does; `folders` are those whose disks are checked; `nvml`, `root` and
    `environment` are for tests.  Raises UserError for GPUs in `gpus` that do not exist.
    """
    given = os.environ if environment is None else environment
    cluster, cluster_error = None, None
    try:
        cluster = profile_hardware("auto", nvml=nvml, environment=given)
    except UserError as error:
        cluster_error = error.message, error.remedy or ""
    if gpus is not None and cluster is not None:
        cluster = select(cluster, gpus)
    memory = psutil.virtual_memory()
    devices = [] if cluster is None else [d for d in cluster.devices if d.traits.has_nvml]
    return Machine(
        load=load_now(),
        num_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 0,
        system=platform.system(),
        python=platform.python_version(),
        cluster=cluster,
        cluster_error=cluster_error,
        torch=probe_torch(),
        ram_total_bytes=memory.total,
        ram_free_bytes=memory.available,
        disks=tuple((str(folder), free_on_disk(folder)) for folder in folders),
        shared_memory_bytes=shared_memory(root),
        on_battery=on_battery(),
        power_modes=tuple(power_modes(root)),
        environment={name: given[name] for name in VARIABLES if name in given},
        ports_in_use=tuple(port for port in RAY_PORTS if is_in_use(port)),
        links=tuple(read_links(devices, nvml=nvml)),
        missing_parts=tuple(part for part, module in OPTIONAL_PARTS.items() if find_spec(module) is None),
        has_punkt=has_punkt() if find_spec("nltk") is not None else None,
    )


def probe_torch() -> TorchBuild:
    """Query torch's build and its allocator's settings in a separate process with this environment."""
    try:
        done = subprocess.run(
            python("-m", "autosft.profiles.hardware.torch_probe"),
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return _broken(f"importing torch and initialising CUDA took more than {_PROBE_TIMEOUT_S} s")
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()
        return _broken(last[-1] if last else f"the process ended with exit code {done.returncode}")
    return TorchBuild(**told)


def _broken(why: str) -> TorchBuild:
    return TorchBuild(version=None, cuda_build=None, sees_cuda=False, error=why)


def free_on_disk(folder: Path) -> int:
    """Return the bytes free on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def shared_memory(root: Path) -> int | None:
    """Return the bytes free in /dev/shm, None where there is none."""
    folder = root / "dev/shm"
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def on_battery() -> bool | None:
    """Return whether the machine runs on battery; None where it has none or does not report it."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return None if battery is None or battery.power_plugged is None else not battery.power_plugged


def power_modes(root: Path) -> list[tuple[str, str]]:
    """Return the power modes that Linux reports: the platform profile and the CPU's governor."""
    places = {
        "platform profile": "sys/firmware/acpi/platform_profile",
        "CPU governor": "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
    }
    found = []
    for what, place in places.items():
        try:
            found.append((what, (root / place).read_text().strip()))
        except OSError:
            continue
    return found


def is_in_use(port: int) -> bool:
    """Return whether something listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def read_links(devices: Sequence[DeviceProfile], *, nvml: ModuleType | None = None) -> list[Link]:
    """Return the link of each pair of GPUs, as the driver reports it."""
    whole = [device for device in devices if not device.is_mig]
    if len(whole) < 2:
        return []
    if nvml is None:
        import pynvml as nvml  # type: ignore[no-redef]
    assert nvml is not None
    nvml.nvmlInit()
    try:
        handles = {item.index: nvml.nvmlDeviceGetHandleByUUID(item.uuid) for item in whole}
        return [
            _link(nvml, (handle, handles[handle]), (other, handles[other]))
            for handle in handles
            for other in handles
            if handle < other
        ]
    finally:
        nvml.nvmlShutdown()


def _link(nvml: ModuleType, first: tuple[int, Any], second: tuple[int, Any]) -> Link:
    def ask(read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except nvml.NVMLError:
            return None

    paths = {
        nvml.NVML_TOPOLOGY_INTERNAL: "one board",
        nvml.NVML_TOPOLOGY_SINGLE: "one PCIe switch",
        nvml.NVML_TOPOLOGY_MULTIPLE: "several PCIe switches",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "the CPU's PCIe bridge",
        nvml.NVML_TOPOLOGY_NODE: "one CPU socket",
        nvml.NVML_TOPOLOGY_SYSTEM: "across CPU sockets",
    }
    other_bus = ask(nvml.nvmlDeviceGetPciInfo, second[1])
    places = range(nvml.NVML_NVLINK_MAX_LINKS)
    states = [ask(nvml.nvmlDeviceGetNvLinkState, first[1], place) for place in places]
    joined = 0
    for link, state in enumerate(states):
        if state != nvml.NVML_FEATURE_ENABLED:
            continue
        remote = ask(nvml.nvmlDeviceGetNvLinkRemotePciInfo, first[1], link)
        # Behind an NVSwitch every link leads to the switch, which connects all GPUs.
        is_other = remote is not None and other_bus is not None and remote.busId == other_bus.busId
        joined += is_other or remote is None or _is_switch(ask, nvml, first[1], link)
    access = ask(nvml.nvmlDeviceGetP2PStatus, first[1], second[1], _P2P_READ)
    return Link(
        first=first[0],
        second=second[0],
        num_nvlinks=None if all(state is None for state in states) else joined,
        path=paths.get(ask(nvml.nvmlDeviceGetTopologyCommonAncestor, first[1], second[1])),
        has_peer_access=None if access is None else access == nvml.NVML_P2P_STATUS_OK,
    )


def _is_switch(ask: Any, nvml: ModuleType, handle: Any, link: int) -> bool:
    kind = ask(nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
    return bool(kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH)
