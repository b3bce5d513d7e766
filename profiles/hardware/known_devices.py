"""The table of known devices (data/devices.json), for plans on devices that are named, not present."""

from __future__ import annotations

import difflib
import functools
import json
import re
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceKind, DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDevice:
    """One row of the table; `sources` names the vendor's document behind each group of figures."""

    name: str
    nvml_names: tuple[str, ...]  # the driver's names for it
    aliases: tuple[str, ...]
    memory_gb: int  # as it is sold
    total_bytes: int  # as NVML reports it; of unified memory, the machine's
    usable_bytes: int  # what an idle card leaves to processes: the driver, ECC or the host keep the rest
    is_unified: bool  # its memory is the machine's RAM
    compute_capability: tuple[int, int]
    num_sms: int
    matmul_flops_per_s: float  # 16-bit tensor cores, dense, fp32 accumulation, the vendor's peak
    matmul_share: float  # of that peak, what torch's large matrix products reach
    memory_bytes_per_s: float
    link_bytes_per_s: float  # one direction, NVLink where the card has it, else PCIe
    host_link_bytes_per_s: float  # one direction
    power_limit_w: float
    sources: tuple[tuple[str, str], ...]


@functools.cache
def known_devices() -> tuple[KnownDevice, ...]:
    """Return all rows in the table's order (by generation, then size)."""
    return tuple(
        KnownDevice(
            name=row["name"],
            nvml_names=tuple(row["nvml_names"]),
            aliases=tuple(row["aliases"]),
            memory_gb=row["memory_gb"],
            is_unified=row.get("is_unified", False),
            total_bytes=row["total_mib"] * 2**20,
            usable_bytes=row["usable_mib"] * 2**20,
            compute_capability=(row["compute_capability"][0], row["compute_capability"][1]),
            num_sms=row["num_sms"],
            matmul_flops_per_s=row["matmul_tflops"] * 1e12,
            matmul_share=row["matmul_share"],
            memory_bytes_per_s=row["memory_gb_per_s"] * 1e9,
            link_bytes_per_s=row["link_gb_per_s"] * 1e9,
            host_link_bytes_per_s=row["host_link_gb_per_s"] * 1e9,
            power_limit_w=row["power_w"],
            sources=tuple(row["sources"].items()),
        )
        for row in _document()["devices"]
    )


def known_device_of(nvml_name: str) -> KnownDevice | None:
    """Return the row with this name, the driver's or the table's; None where there is none."""
    return next((known for known in known_devices() if nvml_name in (known.name, *known.nvml_names)), None)


def default_context_bytes(compute_capability: tuple[int, int] | None, cuda_version: str | None) -> int:
    """Return the bytes of a process's context on a GPU, for machines that were not measured.

    From the first row of the table whose minimum capability and CUDA version are both reached (an unknown
    version counts as recent).
    """
    capability = list(compute_capability or (0, 0))
    version = [int(part) for part in (cuda_version or "99.0").split(".")]
    for row in _document()["context"]:
        if capability >= row["min_compute_capability"] and version >= row["min_cuda"]:
            return int(row["mib"] * 2**20)
    raise AssertionError("the last row of the context table must hold for every device")


def cluster_from_name(spec: str) -> ClusterProfile:
    """Return assumed, idle devices for "L40S", "2xA100-80GB", "4 x rtx 3090" or a size, "24GB".

    A size stands for the known card of that size with the least usable memory, which a note names.  Raises
    UserError, with the closest names, for what is not in the table or matches several rows.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(.+)", spec.strip(), re.IGNORECASE)
    assert match is not None
    count = int(match[1] or 1)
    if not 1 <= count <= 1024:
        raise UserError(f"--hardware {spec}: {count} devices are outside 1 to 1024.")
    size = re.fullmatch(r"(\d+) ?(?:gb?|gib)", match[2].strip(), re.IGNORECASE)
    known, notes = _device_of_size(int(size[1])) if size else (find_known_device(match[2]), ())
    node = "assumed"
    device = DeviceProfile(
        uuid="",
        kind=DeviceKind.CUDA,
        name=known.name,
        node=node,
        index=0,
        total_bytes=known.total_bytes,
        free_bytes=known.usable_bytes,
        compute_capability=known.compute_capability,
        supports_bf16=known.compute_capability >= (8, 0),
        num_cores=known.num_sms,
        matmul_flops_per_s=known.matmul_flops_per_s,
        memory_bytes_per_s=known.memory_bytes_per_s,
        rates_measured=False,
        context_bytes=default_context_bytes(known.compute_capability, None),
        is_mig=False,
        is_assumed=True,
        power_limit_w=known.power_limit_w,
        temperature_c=None,
        throttle_reasons=(),
        processes=(),
        link_bytes_per_s=known.link_bytes_per_s,
        host_link_bytes_per_s=known.host_link_bytes_per_s,
    )
    return ClusterProfile(
        devices=tuple(_numbered(device, index) for index in range(count)),
        driver_version=None,
        cuda_version=None,
        notes=notes,
    )


def find_known_device(name: str) -> KnownDevice:
    """Return the row that a user's name matches, ignoring case, blanks and vendors' prefixes."""
    rows: dict[str, list[KnownDevice]] = {}
    for known in known_devices():
        for alias in {_plain(text) for text in (known.name, *known.nvml_names, *known.aliases)}:
            rows.setdefault(alias, []).append(known)
    found = rows.get(_plain(name), [])
    if len(found) == 1:
        return found[0]
    if found:
        both = ", ".join(known.name for known in found)
        raise UserError(f"--hardware {name} matches several devices: {both}.", remedy="Name one of them.")
    near = difflib.get_close_matches(_plain(name), list(rows), n=12, cutoff=0.5)
    names = list(dict.fromkeys(known.name for alias in near for known in rows[alias]))[:4]
    raise UserError(
        f"--hardware {name}: neither a known device nor a file."
        + (f" Nearest: {', '.join(names)}." if names else ""),
        remedy="Use a card's name (autosft plan --model MODEL --what-gpu lists all that are known), a size "
        "such as 24GB, several as in 2xA100-80GB, auto, cpu, or a file of autosft profile --output FILE.",
    )


def _device_of_size(gb: int) -> tuple[KnownDevice, tuple[str, ...]]:
    """Return the card of a size with the least usable memory (of equals, the slowest), and a note on it."""
    alike = [known for known in known_devices() if known.memory_gb == gb]
    if not alike:
        sizes = sorted({known.memory_gb for known in known_devices()})
        raise UserError(
            f"--hardware {gb}GB: no known card has {gb} GB.",
            remedy=f"Known sizes: {', '.join(map(str, sizes))}; or name a card.",
        )
    least = min(alike, key=lambda known: (known.usable_bytes, known.matmul_flops_per_s, known.name))
    others = [known.name for known in alike if known is not least]
    others = [*others[:4], f"{len(others) - 4} more"] if len(others) > 5 else others
    note = f"{gb} GB: planned for {least.name}"
    if others:
        note += f", the one with the least usable memory of that size; others: {', '.join(others)}"
    return least, (f"{note}.",)


def _numbered(device: DeviceProfile, index: int) -> DeviceProfile:
    return replace(device, uuid=f"GPU-assumed-{index}", index=index)


def _plain(name: str) -> str:
    """Normalise a name: "NVIDIA GeForce RTX 3090" and "rtx-3090" both become "3090"."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce)?(tesla|quadro)?(rtx|gtx)?", "", plain)


@functools.cache
def _document() -> dict[str, list[dict[str, Any]]]:
    text = files("autosft.profiles.data").joinpath("devices.json").read_text(encoding="utf-8")
    document: dict[str, list[dict[str, Any]]] = json.loads(text)
    return document
