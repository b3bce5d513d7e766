"""FSDP, version 1, as far as its memory goes, on one process and the meta device.

Zhao et al. 2023 (arXiv 2304.11277) and torch/distributed/fsdp: every unit keeps its flat shard; the whole
flat parameter is gathered before the unit's forward and backward pass and dropped after it, in the backward
pass one unit ahead; the root's stays from the first forward to the end of the backward pass.  Where anything
of a flat parameter is trained, all of it has gradients; they stay whole while they are accumulated and are
cut when they are reduced.  Activation checkpointing a unit: its forward pass is run again in the backward
pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FlatParameter(nn.Module):
    """Several parameters as one, of which this device keeps its share."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], devices: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = [(name, one.shape, one.numel()) for name, one in parameters.items()]
        self.count = sum(count for _, _, count in self.parts)
        self.trained = any(parameter.requires_grad for parameter in parameters.values())
        shard = torch.empty(-(-self.count // devices), dtype=dtype, device="meta")
        self.shard = nn.Parameter(shard, requires_grad=self.trained)
        self.gathered: Tensor | None = None
        self.gradient: Tensor | None = None

    def gather(self) -> Tensor:
        """Return the whole flat parameter."""
        if self.gathered is None:
            self.gathered = self.shard.new_empty(self.count)
        return self.gathered

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parameters as views of a gathered flat parameter."""
        pieces = flat.split([count for _, _, count in self.parts])
        return {name: piece.view(shape) for (name, shape, _), piece in zip(self.parts, pieces, strict=True)}

    def accumulate(self, gradient: Tensor, *, reduce: bool) -> None:
        """Add to the whole gradient; cut it to this device's share when it is to be reduced."""
        if self.gradient is None:
            self.gradient = gradient
        else:
            self.gradient += gradient
        if reduce:
            self.shard.grad = torch.empty_like(self.shard)
            self.gradient = None


class FsdpModel(nn.Module):
    """What one of several devices keeps of a model.  `reduce` ends an accumulation."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, *, devices: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.units = nn.ModuleList()
        previous: Unit | None = None
        for index, block in enumerate(blocks):
            previous = Unit(block, previous, devices, dtype)
            self.units.append(previous)
            blocks[index] = previous
        inside = {id(parameter) for parameter in self.units.parameters()}
        root = {name: one for name, one in model.named_parameters() if id(one) not in inside}
        self.root = FlatParameter(root, devices, dtype)
        self.__dict__["model"] = model  # not in the module tree: on the device there are the shards
        self.reduce = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for unit in self.units:
            assert isinstance(unit, Unit)
            unit.reduce = self.reduce
        flat = self.root.gather()
        if self.root.trained:
            flat.requires_grad_()
        return functional_call(self.__dict__["model"], self.root.views(flat), args, kwargs)

    def end_backward(self) -> None:
        """Drop the root's whole parameters."""
        flat = self.root.gather()
        self.root.gathered = None
        if flat.grad is not None:
            self.root.accumulate(flat.grad, reduce=self.reduce)


class Unit(nn.Module):
    """One wrapped block: gathered, run, dropped; run again in the backward pass."""

    def __init__(self, block: nn.Module, previous: Unit | None, devices: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.__dict__["previous"] = previous
        self.flat = FlatParameter(dict(block.named_parameters()), devices, dtype)
        self.reduce = False

    def call(self, flat: Tensor, *args: Tensor) -> Tensor:
        result: Tensor = functional_call(self.__dict__["block"], self.flat.views(flat), args)
        return result

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        if not x.requires_grad:
            x = x.detach().requires_grad_()  # the embedding is frozen; gradients start here
        result: Tensor = _Checkpointed.apply(self, x, *args)
        return result


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit: Unit, x: Tensor, *args: Tensor) -> Tensor:
        ctx.unit, ctx.others = unit, args
        ctx.save_for_backward(x)
        flat = unit.flat.gather()
        with torch.no_grad():
            result = unit.call(flat, x, *args)
        unit.flat.gathered = None
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        unit: Unit = ctx.unit
        (x,) = ctx.saved_tensors
        flat = unit.flat.gather()
        previous = unit.__dict__["previous"]
        if previous is not None:
            previous.flat.gather()  # BackwardPrefetch.BACKWARD_PRE
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            flat = flat.detach().requires_grad_(unit.flat.trained)
            result = unit.call(flat, x, *ctx.others)
        wanted = [x, flat] if unit.flat.trained else [x]
        of_x, *of_flat = torch.autograd.grad(result, wanted, gradients[0])
        del result
        if of_flat:
            unit.flat.accumulate(of_flat.pop(), reduce=unit.reduce)
        unit.flat.gathered = None
        return None, of_x, *(None for _ in ctx.others)
