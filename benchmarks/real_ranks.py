"""A step of FSDP2 or DDP on real tensors, over gloo on the CPU: what a trace of several devices has to agree with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.program.blocks import Owner
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.trace import trainer_step
from autosft.profiles.memory.trace.recorder import local_part
from autosft.profiles.recipe import Sharding, StepRecipe
from benchmarks.real_step import LiveBytes, NoRecorder, RealAutocast, build


class LiveShards(LiveBytes):
    """Counts, besides storages of operators, those that FSDP2 empties and fills again."""

    def count(self, tensor: torch.Tensor) -> None:
        super().count(local_part(tensor))

    def release(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if self._seen.pop(storage._cdata, None) is not None:
            self.live -= -(-storage.nbytes() // self.block_bytes) * self.block_bytes


class Told(NoRecorder):
    """Takes what a step says to a recorder; storages go to a counter."""

    def __init__(self, counter: LiveShards) -> None:
        self.counter = counter

    def note(self, tensor: torch.Tensor, operator: str) -> None:  # noqa: ARG002
        self.counter.count(tensor)

    def release(self, tensor: torch.Tensor) -> None:
        self.counter.release(tensor)

    def describe(self, tensor: torch.Tensor, operator: str, owner: Owner) -> None: ...


def peak_of_rank(rank: int, folder: str, config: str, recipe: StepRecipe, shape: Shape, block_bytes: int) -> None:
    """Run the step as one rank of a gloo group, and write the peak of its live bytes into `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), recipe.data_parallel)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=recipe.data_parallel)
    try:
        loop = build(config, recipe, "cpu")
        counter = LiveShards(block_bytes)
        counter.count_model(loop.model)
        with mock.patch.object(trainer_step, "DEVICE", "cpu"), counter:
            autocast = trainer_step.target_of(recipe, DeviceKind.CPU, None).autocast_dtype
            loop.run(Told(counter), RealAutocast(autocast), shape)  # type: ignore[arg-type]
        Path(folder, f"peak-{rank}").write_text(str(counter.peak), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def real_peaks(config: str, recipe: StepRecipe, shape: Shape, folder: Path, *, block_bytes: int = 1) -> list[int]:
    """Return the peak of live bytes on every rank of a real run over gloo."""
    import torch.multiprocessing as mp

    folder.mkdir(parents=True, exist_ok=True)
    arguments = (str(folder), config, recipe, shape, block_bytes)
    mp.start_processes(peak_of_rank, arguments, nprocs=recipe.data_parallel, start_method="fork")
    return [int(Path(folder, f"peak-{rank}").read_text("utf-8")) for rank in range(recipe.data_parallel)]
