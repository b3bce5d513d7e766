"""The step on real tensors of the CPU, with every storage counted: what a trace has to agree with."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.batches import Batch
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.program.run import Run
from autosft.profiles.memory.program_cache import step_programs
from autosft.profiles.memory.sharding import sharded
from autosft.profiles.memory.trace import trainer_step
from autosft.profiles.memory.trace.shallow_model import load_config
from autosft.profiles.memory.trace.trace_errors import Untraceable
from autosft.profiles.memory.trace.tracing import Loop, trace
from autosft.profiles.recipe import StepRecipe


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, in blocks of `block_bytes`, and remembers the most."""

    def __init__(self, block_bytes: int = 1) -> None:
        super().__init__()
        self.block_bytes = block_bytes
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {}

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or size == 0:
            return
        size = -(-size // self.block_bytes) * self.block_bytes

        def died(_: Any) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, died)
        self.live += size
        self.peak = max(self.peak, self.live)

    def count_model(self, model: torch.nn.Module) -> None:
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    self.count(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.count(value)
        return result


class NoRecorder:
    """Takes what a step says to a recorder, and records nothing."""

    known = None

    @contextlib.contextmanager
    def segment(self, *_: Any) -> Iterator[None]:
        yield

    def enter(self, *_: Any) -> None: ...
    def mark_gradients(self, *_: Any) -> None: ...
    def mark_optimizer_state(self, *_: Any) -> None: ...


class RealAutocast:
    """torch's own autocast for the CPU, where the trace has an emulated one."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype, self.active = dtype, False

    def __call__(self) -> Any:
        return contextlib.nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)


def build(config: str, recipe: StepRecipe, device: str) -> Loop:
    """Build the step's loop on a device; `meta` is what the product does."""
    with mock.patch.object(trainer_step, "DEVICE", device):
        return trainer_step.trainer_loop(load_config(config), recipe, DeviceKind.CPU, trust_remote_code=False)


def real_peak_bytes(
    config: str, recipe: StepRecipe, shape: Shape, *, block_bytes: int = 1
) -> tuple[int, int]:
    """Run the step on the CPU; return the peak of live bytes and the number of trained parameters."""
    loop = build(config, recipe, "cpu")
    counter = LiveBytes(block_bytes)
    counter.count_model(loop.model)
    with mock.patch.object(trainer_step, "DEVICE", "cpu"), counter:
        autocast = trainer_step.target_of(recipe, DeviceKind.CPU, None).autocast_dtype
        loop.run(NoRecorder(), RealAutocast(autocast), shape)  # type: ignore[arg-type]
    return counter.peak, num_trained(loop)


def traced_peak_bytes(config: str, recipe: StepRecipe, shape: Shape) -> tuple[int, int]:
    """Trace the step as the product does for a CPU; return the same."""
    loop = build(config, recipe, "meta")
    target = trainer_step.target_of(recipe, DeviceKind.CPU, None)
    return trace(loop, shape, padded=False, target=target).peak_bytes(), num_trained(loop)


def num_trained(loop: Loop) -> int:
    return sum(parameter.numel() for parameter in loop.model.parameters() if parameter.requires_grad)


def predicted_peak_bytes(config: str, recipe: StepRecipe, shape: Shape) -> int | None:
    """Return what a plan predicts of two steps at one shape on the CPU; None where it cannot be traced."""
    programs = step_programs(config, recipe, DeviceKind.CPU, None, trusted=False, cache_dir=None)
    try:
        batch = programs.as_scored(Batch(shape=shape, padded=False))
        program = programs.for_batch(batch)
    except Untraceable:
        return None
    names = ("setup", "micro", "update first", "micro", "update", "evaluate")
    steps = [(program.segments[name], batch.shape) for name in names]
    return Run(steps, sharded(program, recipe)).allocated_bytes()
