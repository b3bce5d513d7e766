"""What kinds of devices do differently is one row each, and nobody else asks for the kind."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from autosft.profiles.hardware.device_kinds import (
    CUBLAS_BYTES,
    CUBLAS_HOPPER_BYTES,
    Capability,
    DeviceKind,
    kind_of_stack,
    kind_of_uuid,
)
from autosft.profiles.memory.trace.device_kernels import KERNELS

ROOT = Path(__file__).parents[3]
#: Rooms in which a branch on the kind of device is refused; tables with a row for each kind are not branches.
ROOMS = ("profiles", "workers", "studies", "scheduler", "autosft")


@pytest.mark.parametrize("kind", DeviceKind)
def test_every_kind_has_a_row_and_kernels(kind: DeviceKind) -> None:
    assert torch.device(kind.traits.torch_name).type == kind.value
    assert kind in KERNELS


@pytest.mark.parametrize(
    ("uuid", "kind"),
    [
        ("GPU-5e4f", DeviceKind.CUDA),
        ("MIG-5e4f", DeviceKind.CUDA),
        ("CPU-host", DeviceKind.CPU),
        ("CPU-host-0of2", DeviceKind.CPU),
        ("anything", DeviceKind.CUDA),
    ],
)
def test_a_uuid_tells_the_kind(uuid: str, kind: DeviceKind) -> None:
    assert kind_of_uuid(uuid) is kind


@pytest.mark.parametrize(
    ("stack", "kind"),
    [
        ("CPU AMD EPYC|torch==2.13|full", DeviceKind.CPU),
        ("NVIDIA L4|torch==2.13|full", DeviceKind.CUDA),
        ("CPUs for rent|torch==2.13|full", DeviceKind.CUDA),
    ],
)
def test_a_stack_tells_the_kind(stack: str, kind: DeviceKind) -> None:
    assert kind_of_stack(stack) is kind


@pytest.mark.parametrize(
    ("kind", "capability", "traced", "workspace_bytes", "has_flash", "has_grouped_mm"),
    [
        (DeviceKind.CUDA, (6, 1), (7, 0), CUBLAS_BYTES, False, False),
        (DeviceKind.CUDA, (7, 5), (7, 0), CUBLAS_BYTES, False, False),
        (DeviceKind.CUDA, (8, 0), (8, 0), CUBLAS_BYTES, True, True),
        (DeviceKind.CUDA, (8, 9), (8, 0), CUBLAS_BYTES, True, True),
        (DeviceKind.CUDA, (9, 0), (8, 0), CUBLAS_HOPPER_BYTES, True, True),
        (DeviceKind.CUDA, None, (8, 0), CUBLAS_BYTES, False, False),
        (DeviceKind.CPU, None, None, 0, False, True),
    ],
)
def test_capability_decides_kernels(
    kind: DeviceKind,
    capability: Capability | None,
    traced: Capability | None,
    workspace_bytes: int,
    has_flash: bool,
    has_grouped_mm: bool,
) -> None:
    traits = kind.traits
    assert traits.traced_capability(capability) == traced
    assert traits.workspace_bytes(capability) == workspace_bytes
    assert traits.has_flash_attention(capability) is has_flash
    assert traits.has_grouped_mm(capability) is has_grouped_mm


def test_nobody_branches_on_the_kind_of_device() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        for line in branches_on_kind(path.read_text(encoding="utf-8"))
    ]
    assert not found, "read a trait of the kind instead (profiles/hardware/device_kinds.py)"


@pytest.mark.parametrize(
    "code",
    [
        "x = device.kind is DeviceKind.CPU",
        "x = DeviceKind.CUDA != device.kind",
        "x = kind in (DeviceKind.CUDA,)",
        "match device.kind:\n    case DeviceKind.CPU: ...",
    ],
)
def test_a_branch_on_the_kind_is_noticed(code: str) -> None:
    assert branches_on_kind(code)


def branches_on_kind(code: str) -> list[int]:
    """Return the lines of comparisons with a kind of device."""
    branches = (
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, (ast.Compare, ast.match_case))
        and any(
            isinstance(part, ast.Attribute)
            and isinstance(part.value, ast.Name)
            and part.value.id == "DeviceKind"
            for part in ast.walk(node.pattern if isinstance(node, ast.match_case) else node)
        )
    )
    return [node.lineno if isinstance(node, ast.Compare) else node.pattern.lineno for node in branches]
