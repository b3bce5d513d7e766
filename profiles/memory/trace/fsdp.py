"""Shard a traced model as FSDP2 does on every rank: its own hooks, without the other ranks.

`shard` applies transformers' plan (`maybe_distribute_model`, as `workers.training.fsdp` has it applied while
loading) over a fake process group.  On the meta device, collectives are replaced through FSDP2's public
interface by ones that only allocate; `watching` tells the recorder of storages that FSDP2 empties and fills
again, which no operator shows.  On other devices (tests over gloo) the group is the one that is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor

from autosft.profiles.memory.program.blocks import ALL_GATHER, REDUCE_SCATTER, Owner
from autosft.profiles.memory.trace.parts import local_part
from autosft.profiles.recipe import StepRecipe


class Storages(Protocol):
    """Whoever counts storages: the recorder of a trace, or a test."""

    def note(self, tensor: torch.Tensor, operator: str) -> None: ...
    def release(self, tensor: torch.Tensor) -> None: ...
    def describe(self, tensor: torch.Tensor, operator: str, owner: Owner) -> None: ...


class _Described:
    """Who is told what buffers of collectives are for; set while a step is traced."""

    storages: Storages | None = None

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, operator: str, owner: Owner
    ) -> torch.Tensor:
        made = torch.empty(*size, dtype=dtype, device="meta")
        if self.storages is not None:
            self.storages.describe(made, operator, owner)
        return made


class _NoAllGather(AllGather):
    """Allocates what an all-gather needs, and sends nothing."""

    def __init__(self, described: _Described) -> None:
        self.described = described

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self.described.allocate(size, dtype=dtype, operator=ALL_GATHER, owner=Owner.PARAMETER)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> None:
        return None


class _NoReduceScatter(ReduceScatter):
    """Allocates what a reduce-scatter needs, and sends nothing."""

    def __init__(self, described: _Described) -> None:
        self.described = described
        self.is_output = False

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # The whole gradients first, in the stream that computes; then their share, in a stream of its own.
        operator = REDUCE_SCATTER if self.is_output else "fsdp::chunk_cat"
        self.is_output = not self.is_output
        return self.described.allocate(size, dtype=dtype, operator=operator, owner=Owner.GRADIENT)

    def __call__(
        self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False
    ) -> None:
        return None


@contextlib.contextmanager
def _group_of(num_ranks: int) -> Iterator[None]:
    """Be rank 0 of `num_ranks`, none of which answers; or one of the ranks of the group that there is."""
    if dist.is_initialized():
        assert dist.get_world_size() == num_ranks, "another process group is in use"
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: Any, recipe: StepRecipe) -> None:
    """Shard a model over `recipe.data_parallel` ranks as `from_pretrained` does.

    Raises ValueError for architectures without a plan of their own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import TransformersDeviceMesh

    num = recipe.data_parallel
    config = DistributedConfig(fsdp_size=num, fsdp_mixed_precision=recipe.precision.has_bf16_weights)
    is_tied = _untie(model)
    with _group_of(num):
        dense = init_device_mesh("cpu", (1, 1, num, 1), mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
        expert = init_device_mesh("cpu", (1, 1, num, 1), mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"))
        model.maybe_distribute_model(model, config, TransformersDeviceMesh(dense, expert))
    if is_tied:
        model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        _send_nothing(model)


def _untie(model: Any) -> bool:
    """Give tied weights storages of their own, as before they are loaded; return whether there are any."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name in tied:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, last)
        setattr(module, last, torch.nn.Parameter(torch.empty_like(weight), weight.requires_grad))
    return bool(tied)


def _send_nothing(model: Any) -> None:
    described = _Described()
    for module in _sharded_modules(model):
        module.set_custom_all_gather(_NoAllGather(described))
        module.set_custom_reduce_scatter(_NoReduceScatter(described))
        for group in _groups(module):
            group._validate_no_meta_params = _accept
    model._described_by_autosft = described


def _accept() -> None:
    """Accept weights on the meta device, for which FSDP2 would refuse to run."""


@contextlib.contextmanager
def watching(model: torch.nn.Module, storages: Storages) -> Iterator[None]:
    """Within the context, tell `storages` what FSDP2 allocates and frees without an operator.

    Begins and ends with all parameters sharded.
    """
    alloc, free = _fsdp_param.alloc_storage, _fsdp_param.free_storage
    described: list[Any] = [
        module._described_by_autosft for module in model.modules() if hasattr(module, "_described_by_autosft")
    ]

    def allocated(tensor: torch.Tensor) -> None:
        alloc(tensor)
        storages.note(tensor, "aten::empty.memory_format")
        storages.describe(tensor, "aten::empty.memory_format", Owner.PARAMETER)

    def freed(tensor: torch.Tensor) -> None:
        storages.release(tensor)
        free(tensor)

    _fsdp_param.alloc_storage, _fsdp_param.free_storage = allocated, freed
    for one in described:
        one.storages = storages
    try:
        yield
        # An evaluation leaves weights gathered, and an order to prefetch them in.
        _root(model).reset_iter_state()
    finally:
        _fsdp_param.alloc_storage, _fsdp_param.free_storage = alloc, free
        for one in described:
            one.storages = None


@contextlib.contextmanager
def reducing(model: torch.nn.Module, *, is_last: bool) -> Iterator[None]:
    """Run a micro batch as Trainer does: gradients are reduced after the last of an optimizer step.

    `Trainer._defer_fsdp_gradient_reduction`: until then every rank holds whole gradients.
    """
    _root(model).set_requires_gradient_sync(is_last)
    try:
        yield
    finally:
        _root(model).set_requires_gradient_sync(True)


def mark_gradients(model: torch.nn.Module, storages: Storages) -> None:
    """Say of shards of gradients that they are in the stream that reduces, whatever made them there."""
    for parameter in model.parameters():
        if isinstance(parameter.grad, DTensor):
            storages.describe(local_part(parameter.grad), REDUCE_SCATTER, Owner.GRADIENT)


def whole_gradients(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Yield the gradients on this rank that are not reduced yet."""
    for module in _sharded_modules(model):
        for group in _groups(module):
            for one in group.fsdp_params:
                whole = one.unsharded_accumulated_grad
                if whole is None and hasattr(one, "_unsharded_param"):
                    whole = one._unsharded_param.grad
                if whole is not None:
                    yield whole


def _sharded_modules(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _root(model: torch.nn.Module) -> Any:
    return _sharded_modules(model)[0]  # modules come before those that they contain


def _groups(module: Any) -> list[Any]:
    groups: list[Any] = module._get_fsdp_state()._fsdp_param_groups
    return groups
