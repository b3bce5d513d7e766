"""A step of FSDP2 or DDP on real tensors, over gloo: what a trace of several devices has to agree with."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.trace import trainer_step
from autosft.profiles.memory.trace.parts import local_part
from autosft.profiles.memory.trace.tracing import Loop
from autosft.profiles.recipe import Sharding, StepRecipe
from benchmarks.real_step import LiveBytes, NoRecorder, RealAutocast, build


class LiveShards(LiveBytes):
    """Adds up what all storages hold after every operator: FSDP2 empties and refills some of them."""

    def count(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, FakeTensor):  # DTensor asks those for shapes
            return
        storage = local_part(tensor).untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, lambda _: self._seen.pop(key, None))
        known = list(self._seen.values())  # other threads let storages go, and so does `found` below
        held = (found.nbytes() for seen in known if (found := seen()) is not None)
        self.live = sum(-(-size // self.block_bytes) * self.block_bytes for size in held)
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # run on the parts, and then seen here
        return super().__torch_dispatch__(func, types, args, kwargs)


class Unheard(NoRecorder):
    """Takes what FSDP2's hooks say as well: here, storages are looked at."""

    def note(self, *_: Any) -> None: ...
    def release(self, *_: Any) -> None: ...
    def describe(self, *_: Any) -> None: ...


def real_peaks(
    config: str, recipe: StepRecipe, shape: Shape, folder: Path, *, block_bytes: int = 1
) -> list[int]:
    """Run the step over gloo, one process a rank; return the peak of live bytes on every rank.

    Clipping and the optimizer work on DTensors, as in training.
    """
    import torch.multiprocessing as mp

    folder.mkdir(parents=True, exist_ok=True)
    arguments = (str(folder), config, recipe, shape, block_bytes)
    mp.start_processes(_run_rank, arguments, nprocs=recipe.data_parallel, start_method="fork")
    return [int(Path(folder, f"peak-{rank}").read_text("utf-8")) for rank in range(recipe.data_parallel)]


def _run_rank(
    rank: int, folder: str, config: str, recipe: StepRecipe, shape: Shape, block_bytes: int
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), recipe.data_parallel)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=recipe.data_parallel)
    try:
        loop = build(config, recipe, "cpu")
        counter = LiveShards(block_bytes)
        counter.count_model(loop.model)
        autocast = trainer_step.target_of(recipe, DeviceKind.CPU, None).autocast_dtype
        with (
            mock.patch.object(trainer_step, "DEVICE", "cpu"),
            mock.patch.object(trainer_step, "trained_here", _trained),
            counter,
        ):
            _run_of(loop, recipe)(Unheard(), RealAutocast(autocast), shape)
        Path(folder, f"peak-{rank}").write_text(str(counter.peak), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class _Replicas(DistributedDataParallel):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def _run_of(loop: Loop, recipe: StepRecipe) -> Any:
    """Return what runs the loop; with DDP around its model, as accelerate puts it."""
    if recipe.sharding is not Sharding.DDP:
        return loop.run
    run: Any = loop.run

    def replicated(*args: Any) -> None:
        run.func(*args, **{**run.keywords, "model": _Replicas(loop.model)})

    return replicated
