"""How fast the GPUs of a node add up gradients: an all-reduce, measured with NCCL as training runs it.

    python -m autosft.profiles.hardware.all_reduce cuda 4

Each GPU gets a process; on CPUs gloo stands for NCCL, so that this can be tried without GPUs.  The bus
bandwidth is printed, as nccl-tests defines it: 2 (n-1)/n of the message's bytes over its time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from autosft.profiles.hardware.benchmark import TIMEOUT_S
from autosft.profiles.hardware.device import DeviceKind

#: A DDP bucket is 25 MiB; larger messages show what the links can do.
MESSAGE_BYTES = {DeviceKind.CUDA: 256 << 20, DeviceKind.CPU: 16 << 20}
NUM_ROUNDS = 5  # the fastest counts, since other programs can only slow one down
NUM_AT_ONCE = 4


def main(arguments: Sequence[str]) -> None:
    """Measure over so many devices of a kind and print bytes a second."""
    kind, num_devices = DeviceKind(arguments[0]), int(arguments[1])
    with tempfile.TemporaryDirectory(prefix="autosft-") as folder:
        spawn(_measure, (num_devices, kind, Path(folder)), nprocs=num_devices)  # type: ignore[no-untyped-call]
        slowest_s = max(float(file.read_text()) for file in Path(folder).glob("seconds-*"))
    sent_bytes = 2 * (num_devices - 1) / num_devices * MESSAGE_BYTES[kind]
    sys.stdout.write(json.dumps(sent_bytes / slowest_s) + "\n")


def _measure(rank: int, num_devices: int, kind: DeviceKind, folder: Path) -> None:
    """Write the seconds of one all-reduce as this process sees them."""
    is_gpu = kind is DeviceKind.CUDA
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_devices,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
        device_id=device if is_gpu else None,
    )
    message = torch.zeros(MESSAGE_BYTES[kind] // 4, device=device)

    try:
        rounds_s = [_round_s(message, is_gpu=is_gpu) for _ in range(NUM_ROUNDS + 1)]
        (folder / f"seconds-{rank}").write_text(repr(min(rounds_s[1:])))  # the first one builds connections
    finally:
        dist.destroy_process_group()


def _round_s(message: torch.Tensor, *, is_gpu: bool) -> float:
    """Return the seconds of one all-reduce, over as many as every process runs."""
    started = time.perf_counter()
    for _ in range(NUM_AT_ONCE):
        dist.all_reduce(message)
    if is_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / NUM_AT_ONCE


if __name__ == "__main__":
    main(sys.argv[1:])
