"""Keep zeros zero in full fine-tuning, by masks of the weights that a run starts with.

A mask has one bit per weight.  It is applied to the gradient before clipping, so that the gradient norm is
that of the weights that change, and to the weights after the optimizer's step, so that neither momentum nor
weight decay nor the optimizer's arithmetic can revive a zero.  With FSDP each rank masks its shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autosft.profiles.errors import UserError
from autosft.profiles.model.sparsity import PRUNED_SHARE

#: How many weights are unpacked at a time: bounds the working memory to about 50 MB.
CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class _Masked:
    name: str
    parameter: torch.nn.Parameter
    bits: torch.Tensor  # uint8, bit k of byte i: whether weight 8 i + k is a zero to keep
    num_zeros: int


class ZeroMasks:
    """The zeros to keep in a model's weight matrices."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Create the masks from the current weights, on their devices.

        Raises UserError for a model without zeros in its trainable matrices.
        """
        self._masked: list[_Masked] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dim() >= 2:
                zero = local(parameter).detach() == 0
                if num_zeros := int(zero.sum()):
                    self._masked.append(_Masked(name, parameter, pack(zero), num_zeros))
        is_pruned = any(
            masked.num_zeros >= PRUNED_SHARE * local(masked.parameter).numel() for masked in self._masked
        )
        if not is_pruned and not is_sharded(model):  # one rank's shards may happen to have no zeros
            raise UserError(
                f"no weight matrix of the model has {PRUNED_SHARE:.0%} zeros, so there is nothing to keep.",
                remedy="Use --method full, or prune the model first (autosft check-sparsity FOLDER).",
            )

    @property
    def num_zeros(self) -> int:
        """The number of weights kept at zero (on this rank)."""
        return sum(masked.num_zeros for masked in self._masked)

    def clear_gradients(self) -> None:
        """Set the gradients of masked weights to zero."""
        for masked in self._masked:
            if masked.parameter.grad is not None:
                fill_zero(local(masked.parameter.grad), masked.bits)

    def clear_weights(self) -> None:
        """Set the masked weights to zero."""
        for masked in self._masked:
            fill_zero(local(masked.parameter).detach(), masked.bits)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear the weights after each step of `optimizer`."""
        optimizer.register_step_post_hook(lambda *_: self.clear_weights())

    def check(self) -> None:
        """Raise RuntimeError if a masked weight is no longer zero."""
        for masked in self._masked:
            num_revived = count_not_zero(local(masked.parameter).detach(), masked.bits)
            if num_revived:
                raise RuntimeError(
                    f"{num_revived:,} of {masked.num_zeros:,} zeros of {masked.name} were lost in training; "
                    "the checkpoint is discarded."
                )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that may be sharded."""
    to_local: Any = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


def is_sharded(model: torch.nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def pack(zero: torch.Tensor) -> torch.Tensor:
    """Pack booleans into bits, eight per byte, little-endian."""
    parts = []
    for chunk in torch.split(zero.reshape(-1), CHUNK):
        padded = torch.nn.functional.pad(chunk.to(torch.uint8), (0, -len(chunk) % 8))
        parts.append((padded.view(-1, 8) << places(zero.device)).sum(dim=1, dtype=torch.uint8))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=zero.device)


def places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def chunks(tensor: torch.Tensor, bits: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield chunks of a tensor, as views, with their unpacked bits."""
    shifts = places(tensor.device)
    flat = tensor.view(-1)
    for piece, packed in zip(torch.split(flat, CHUNK), torch.split(bits, CHUNK // 8), strict=True):
        zero = (packed.unsqueeze(1) >> shifts).bitwise_and_(1).view(torch.bool)
        yield piece, zero.view(-1)[: len(piece)]


def fill_zero(tensor: torch.Tensor, bits: torch.Tensor) -> None:
    """Set the entries whose bit is set to zero, in place."""
    if not tensor.is_contiguous():  # a gradient may have another memory layout
        dense = tensor.contiguous()
        fill_zero(dense, bits)
        tensor.copy_(dense)
        return
    for piece, zero in chunks(tensor, bits):
        piece.masked_fill_(zero, 0)


def count_not_zero(tensor: torch.Tensor, bits: torch.Tensor) -> int:
    """Count the entries whose bit is set and that are not zero."""
    return sum(int((piece[zero] != 0).sum()) for piece, zero in chunks(tensor.contiguous(), bits))
