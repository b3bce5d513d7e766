"""FSDP, version 1, as far as its memory goes, on one process and the meta device.

Zhao et al. 2023 (arXiv 2304.11277) and torch/distributed/fsdp: every unit keeps its flat shard; the whole
flat parameter is gathered before the unit's forward and backward pass and dropped after it, in the backward
pass one unit ahead; the root's stays from the first forward to the end of the backward pass.  Gradients are
those of the whole flat parameter where any of it is trained, and stay whole while they are accumulated.
Activation checkpointing a unit: its forward pass is run again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FsdpModel(nn.Module):
    """What one of `devices` keeps of a model: its shards.  Replaces `blocks` by units, in place."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, *, devices: int, dtype: torch.dtype) -> None:
        super().__init__()
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        root = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        count = sum(parameter.numel() for parameter in root)
        self.register_buffer("root_shard", _empty(-(-count // devices), dtype))
        previous: Unit | None = None
        for index, block in enumerate(blocks):
            previous = Unit(block, previous, devices, dtype)
            self.register_buffer(f"shard_{index}", previous.shard)
            blocks[index] = previous
        model.register_forward_pre_hook(_gather_root(count, dtype))
        self._first_unit_input(blocks)

    @staticmethod
    def _first_unit_input(blocks: nn.ModuleList) -> None:
        """Let gradients flow through the first unit although the embedding is frozen."""

        def require(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            first = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return (first, *args[1:])

        blocks[0].register_forward_pre_hook(require)


def _empty(count: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(count, dtype=dtype, device="meta")


def _gather_root(count: int, dtype: torch.dtype) -> Any:
    def hook(module: nn.Module, _: Any) -> None:
        module.__dict__["gathered_root"] = _empty(count, dtype)

    return hook


class Unit(nn.Module):
    """One wrapped block: gathered, run, dropped; run again in the backward pass."""

    def __init__(self, block: nn.Module, previous: Unit | None, devices: int, dtype: torch.dtype) -> None:
        super().__init__()
        # kept out of the module tree: on a device there are the shards, not the parameters
        self.__dict__["block"] = block
        self.__dict__["previous"] = previous
        self.dtype = dtype
        self.parts = [(name, one.shape, one.numel()) for name, one in block.named_parameters()]
        self.count = sum(count for _, _, count in self.parts)
        self.shard = _empty(-(-self.count // devices), dtype)
        self.gathered: Tensor | None = None
        self.gradient: Tensor | None = None

    def gather(self) -> Tensor:
        if self.gathered is None:
            self.gathered = _empty(self.count, self.dtype)
        return self.gathered

    def call(self, flat: Tensor, *args: Tensor) -> Tensor:
        pieces = flat.split([count for _, _, count in self.parts])
        views = {name: piece.view(shape) for (name, shape, _), piece in zip(self.parts, pieces, strict=True)}
        result: Tensor = functional_call(self.__dict__["block"], views, args)
        return result

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        result: Tensor = _Checkpointed.apply(self, x, *args)
        return result


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: Unit, x: Tensor, *args: Tensor) -> Tensor:
        ctx.unit, ctx.others = unit, args
        ctx.save_for_backward(x)
        flat = unit.gather()
        with torch.no_grad():
            result = unit.call(flat, x, *args)
        unit.gathered = None
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        unit: Unit = ctx.unit
        (x,) = ctx.saved_tensors
        flat = unit.gather()
        previous = unit.__dict__["previous"]
        if previous is not None:
            previous.gather()  # BackwardPrefetch.BACKWARD_PRE
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            flat = flat.detach().requires_grad_()
            result = unit.call(flat, x, *ctx.others)
        of_x, of_flat = torch.autograd.grad(result, [x, flat], gradients[0])
        del result
        if unit.gradient is None:
            unit.gradient = of_flat
        else:
            unit.gradient += of_flat
        unit.gathered = None
        return None, of_x, *(None for _ in ctx.others)
