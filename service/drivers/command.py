"""The command line and environment of a driver: what its user would have typed, and which devices it has."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autosft.service.values import Device, Item

#: Commands that take --hardware and --gpus; the others use the devices that they see.
PLACED_BY_FLAGS = frozenset({"tune", "train"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverCommand:
    """What is executed, and what is added to the environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]


def driver_command(
    item: Item, devices: Sequence[Device], *, hardware: str, address: str | None = None
) -> DriverCommand:
    """Return the command that runs an item on these devices.

    GPUs are given by CUDA_VISIBLE_DEVICES, which every command and every library follows; parts of a CPU by
    flags; those of other nodes by the cluster's address and their UUIDs.  `hardware` and `address` are what
    the server was started with.
    """
    argv = [sys.executable, "-P", "-m", "autosft", *item.arguments.to_argv()]
    uuids = [device.uuid for device in devices]
    if any(device.is_elsewhere for device in devices):
        assert address is not None
        argv += [f"--hardware={hardware}", f"--address={address}", f"--gpus={','.join(uuids)}"]
        return DriverCommand(argv=tuple(argv), environment={})
    if all(uuid.upper().startswith(("GPU-", "MIG-")) for uuid in uuids):
        return DriverCommand(
            argv=tuple(argv),
            environment={"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(uuids)},
        )
    if item.arguments.command in PLACED_BY_FLAGS:
        at = argv.index("--") if "--" in argv else len(argv)
        placed = [f"--hardware={hardware}"]
        if "x" in hardware.lower():  # 2xcpu
            placed.append(f"--gpus={','.join(uuids)}")
        argv[at:at] = placed
    return DriverCommand(argv=tuple(argv), environment={})


def inherited() -> dict[str, str]:
    """Return the server's environment without what belongs to the server itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AUTOSFT_QUEUE_")}
