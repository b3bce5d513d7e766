"""Discover the devices that trials can run on: this machine's, known ones by name, and saved profiles.

Nothing here initialises CUDA or imports torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceKind, DeviceProcess, DeviceProfile


def profile_hardware(
    spec: str, *, nvml: ModuleType | None = None, environment: Mapping[str, str] | None = None
) -> ClusterProfile:
    """Return the devices that `--hardware SPEC` means.

    - `auto`: every NVIDIA GPU that the driver and CUDA_VISIBLE_DEVICES show (MIG slices are devices), else
      this machine's cores and RAM
    - `cpu`: this machine's cores and RAM; `2xcpu`: two devices of half of them each, for trials over several
      devices without GPUs
    - the name of a known device ("L40S", "2xA100-80GB"): that many of them, assumed idle
    - anything else: a file that `save_profile` wrote

    Indices in CUDA_VISIBLE_DEVICES are read in PCI order, as nvidia-smi counts; CUDA itself orders different
    cards fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID is set.  `nvml` and `environment` replace pynvml
    and os.environ in tests.

    Raises UserError for a driver that is installed but does not answer, an unknown name, and a file that is
    missing, damaged or not a profile.
    """
    from autosft.profiles.hardware.host import profile_host, split_host
    from autosft.profiles.hardware.known_devices import cluster_from_name
    from autosft.profiles.hardware.nvml import read_gpus

    wanted = spec.strip()
    if parts := re.fullmatch(r"(\d+) ?[x×*] ?cpu", wanted, re.IGNORECASE):
        return ClusterProfile(devices=split_host(int(parts[1])), driver_version=None, cuda_version=None)
    match wanted.lower():
        case "":
            raise UserError(
                "--hardware is empty.", remedy="Use auto, cpu, the name of a device, or a profile file."
            )
        case "cpu":
            return ClusterProfile(devices=(profile_host(),), driver_version=None, cuda_version=None)
        case "auto":
            gpus = read_gpus(nvml=nvml, environment=os.environ if environment is None else environment)
            return ClusterProfile(
                devices=gpus.devices if gpus and gpus.devices else (profile_host(),),
                driver_version=gpus.driver_version if gpus else None,
                cuda_version=gpus.cuda_version if gpus else None,
                notes=gpus.notes if gpus else (),
            )
    if Path(wanted).suffix.lower() == ".json" or Path(wanted).is_file():
        return load_profile(Path(wanted))
    return cluster_from_name(wanted)


def refresh(cluster: ClusterProfile, *, nvml: ModuleType | None = None) -> ClusterProfile:
    """Read free memory, processes, temperature and throttling of this machine's devices again.

    Assumed devices and those of other nodes are unchanged.  A GPU of this machine that no longer answers is
    dropped and named in `notes`.  Raises UserError when no device is left.
    """
    from autosft.profiles.hardware.host import host_name, profile_host
    from autosft.profiles.hardware.nvml import read_gpus

    here = [d for d in cluster.devices if d.node == host_name() and not d.is_assumed]
    now: dict[str, DeviceProfile] = {}
    if cpus := [d for d in here if not d.traits.has_own_memory]:
        host = profile_host()
        # The parts of a split machine share its RAM: none has more than is free in all.
        now.update({d.uuid: replace(d, free_bytes=min(d.total_bytes, host.free_bytes)) for d in cpus})
    if any(d.traits.has_nvml for d in here):
        reading = read_gpus(nvml=nvml, environment={})
        now.update((d.uuid, d) for d in (reading.devices if reading is not None else ()))

    devices: list[DeviceProfile] = []
    lost: list[str] = []
    for device in cluster.devices:
        if device not in here:
            devices.append(device)
        elif device.uuid in now:
            fresh = now[device.uuid]
            devices.append(
                replace(
                    device,
                    free_bytes=fresh.free_bytes,
                    processes=fresh.processes,
                    temperature_c=fresh.temperature_c,
                    throttle_reasons=fresh.throttle_reasons,
                    power_limit_w=fresh.power_limit_w,
                )
            )
        else:
            lost.append(f"GPU {device.index} ({device.name}) no longer answers.")
    if not devices:
        raise UserError(
            " ".join(lost), remedy="Look at nvidia-smi and the kernel log (dmesg | grep -i nvrm)."
        )
    return replace(cluster, devices=tuple(devices), notes=cluster.notes + tuple(lost))


def select(cluster: ClusterProfile, gpus: str) -> ClusterProfile:
    """Keep the devices that `--gpus` names, in the order given.

    "2,3" are indices in nvidia-smi's order, "0:1" is the second MIG slice of GPU 0 ("0": all of its
    slices), and "GPU-5e4f…" or "MIG-…" is the beginning of a UUID.  Raises UserError for what matches
    nothing.
    """
    if len(cluster.devices) == 1 and not cluster.devices[0].traits.is_gpu:
        raise UserError(f"--gpus {gpus}: there is no GPU here.", remedy="Leave --gpus out to use the CPU.")
    chosen: list[DeviceProfile] = []
    for item in (part.strip() for part in gpus.split(",")):
        if not item:
            raise UserError(f"--gpus {gpus!r} has an empty entry.", remedy="Write it like --gpus 2,3.")
        found = _matching(cluster.devices, item)
        if not found:
            there = ", ".join(f"{_label(cluster.devices, d)} ({d.name})" for d in cluster.devices)
            raise UserError(
                f"--gpus {gpus}: there is no device {item!r}. Devices here: {there}.",
                remedy="CUDA_VISIBLE_DEVICES hides the others."
                if os.environ.get("CUDA_VISIBLE_DEVICES")
                else None,
            )
        repeated = [d for d in found if d in chosen]
        if repeated:
            raise UserError(f"--gpus {gpus} names {_label(cluster.devices, repeated[0])} twice.")
        chosen += found
    return replace(cluster, devices=tuple(chosen))


def named_by_uuid(gpus: str) -> Callable[[DeviceProfile], bool] | None:
    """Return whether a device is among those that `--gpus` names by UUID; None if one is named otherwise."""
    items = tuple(part.strip().lower() for part in gpus.split(","))
    if not all(_UUID.match(item) for item in items):
        return None
    return lambda device: device.uuid.lower().startswith(items)


def save_profile(cluster: ClusterProfile, path: Path) -> None:
    """Write a profile as JSON, for `--hardware FILE` here or on another machine."""
    document = {"format": _FORMAT, **asdict(cluster)}
    path.write_text(
        json.dumps(document, indent=2, default=lambda value: value.value) + "\n", encoding="utf-8"
    )


def load_profile(path: Path) -> ClusterProfile:
    """Read what `save_profile` wrote; its devices count as assumed except on the machine they were found on.

    Raises UserError for a file that is missing, not JSON, not a profile, or of a newer format.
    """
    from autosft.profiles.hardware.host import host_name

    remedy = "Write one with: autosft profile --output FILE"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--hardware {path}: there is no such file.", remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hardware {path} cannot be read: {error}.", remedy=remedy) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"--hardware {path} line {error.lineno} is not JSON: {error.msg}.", remedy=remedy
        ) from None
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise UserError(f"--hardware {path} is not a hardware profile of format {_FORMAT!r}.", remedy=remedy)
    try:
        devices = tuple(_device_from_json(entry) for entry in document["devices"])
        cluster = ClusterProfile(
            devices=devices,
            driver_version=document["driver_version"],
            cuda_version=document["cuda_version"],
            notes=tuple(document.get("notes", ())),
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"--hardware {path} is damaged: {error!r}.", remedy=remedy) from None
    if not cluster.devices:
        raise UserError(f"--hardware {path} lists no device.", remedy=remedy)
    assumed = tuple(replace(d, is_assumed=d.is_assumed or d.node != host_name()) for d in cluster.devices)
    return replace(cluster, devices=assumed)


_UUID = re.compile(r"(GPU|MIG|CPU)-", re.IGNORECASE)
_FORMAT = "autosft hardware profile 1"


def _matching(devices: Sequence[DeviceProfile], item: str) -> list[DeviceProfile]:
    """Return the devices that one entry of `--gpus` selects."""
    if re.fullmatch(r"\d+", item):
        return [d for d in devices if d.index == int(item)]
    if match := re.fullmatch(r"(\d+):(\d+)", item):
        slices = [d for d in devices if d.is_mig and d.index == int(match[1])]
        return slices[int(match[2]) : int(match[2]) + 1]
    if _UUID.match(item):
        return [d for d in devices if d.uuid.lower().startswith(item.lower())]
    return []


def _label(devices: Sequence[DeviceProfile], device: DeviceProfile) -> str:
    """Return a device's name for `--gpus`."""
    if not device.is_mig:
        return str(device.index)
    slices = [d for d in devices if d.is_mig and d.index == device.index]
    return f"{device.index}:{slices.index(device)}"


def _device_from_json(entry: dict[str, Any]) -> DeviceProfile:
    known = {field.name for field in fields(DeviceProfile)}
    values = {name: value for name, value in entry.items() if name in known}
    for name in ("total_bytes", "free_bytes", "context_bytes", "num_cores", "index"):
        if not isinstance(values[name], int) or values[name] < 0:
            raise ValueError(f"{name} is {values[name]!r}, not a count")
    capability = values["compute_capability"]
    values["kind"] = DeviceKind(values["kind"])
    values["compute_capability"] = None if capability is None else (int(capability[0]), int(capability[1]))
    values["throttle_reasons"] = tuple(values["throttle_reasons"])
    values["processes"] = tuple(DeviceProcess(**process) for process in values["processes"])
    return DeviceProfile(**values)
