"""Measure the all-reduce bandwidth of a node's GPUs, with NCCL as in training.

    python -m autosft.profiles.hardware.all_reduce cuda 4

Runs one process per GPU; CPUs use gloo instead of NCCL, so that this can be tested without GPUs.  Prints the
bus bandwidth as nccl-tests defines it: 2 (n-1)/n of the message's bytes, divided by the time.
"""

from __future__ import annotations

import json
import os
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
from autosft.profiles.hardware.device_kinds import DeviceKind
from autosft.profiles.hardware.local_sockets import local_only

NUM_ROUNDS = 5  # the fastest counts: other programs can only slow a round down
NUM_AT_ONCE = 4


def main(arguments: Sequence[str]) -> None:
    """Measure over `arguments`, a kind and a number of devices; print bytes per second."""
    kind, num_devices = DeviceKind(arguments[0]), int(arguments[1])
    os.environ.update(local_only())
    with tempfile.TemporaryDirectory(prefix="autosft-") as folder:
        spawn(_measure, (num_devices, kind, Path(folder)), nprocs=num_devices)  # type: ignore[no-untyped-call]
        slowest_s = max(float(file.read_text()) for file in Path(folder).glob("seconds-*"))
    sent_bytes = 2 * (num_devices - 1) / num_devices * kind.traits.all_reduce_message_bytes
    sys.stdout.write(json.dumps(sent_bytes / slowest_s) + "\n")


def _measure(rank: int, num_devices: int, kind: DeviceKind, folder: Path) -> None:
    """Measure one all-reduce in this process and write its seconds to `folder`."""
    is_gpu = kind.traits.is_gpu
    device = torch.device(kind.traits.torch_name, rank) if is_gpu else torch.device(kind.traits.torch_name)
    dist.init_process_group(
        kind.traits.collective_backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_devices,
        timeout=timedelta(seconds=TIMEOUT_S / 2),
        device_id=device if is_gpu else None,
    )
    message = torch.zeros(kind.traits.all_reduce_message_bytes // 4, device=device)

    try:
        rounds_s = [_round_s(message, is_gpu=is_gpu) for _ in range(NUM_ROUNDS + 1)]
        (folder / f"seconds-{rank}").write_text(repr(min(rounds_s[1:])))  # the first one opens connections
    finally:
        dist.destroy_process_group()


def _round_s(message: torch.Tensor, *, is_gpu: bool) -> float:
    """Return the seconds of one all-reduce, averaged over NUM_AT_ONCE of them."""
    started = time.perf_counter()
    for _ in range(NUM_AT_ONCE):
        dist.all_reduce(message)
    if is_gpu:
        torch.accelerator.synchronize()
    return (time.perf_counter() - started) / NUM_AT_ONCE


if __name__ == "__main__":
    main(sys.argv[1:])
