"""Emulate the memory of Liger's cross entropy and fused linear cross entropy on the meta device.

liger-kernel's functions call Triton kernels, which the meta device does not have.  What they allocate around
them, on CUDA, follows ops/cross_entropy.py and ops/fused_linear_cross_entropy.py (0.8.5): the logits'
gradient overwrites the logits; the fused version computes logits for a chunk of tokens at a time, and
computes the gradients of the hidden states and of the head in the forward pass.

The chunk size is rounded to a power of two: the sizes of such a step are not polynomials in its shape, and
every shape has to be traced.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from autosft.profiles.hardware.device_kinds import DeviceKind
from autosft.profiles.memory.trace.emulation import Autocast
from autosft.profiles.memory.trace.trace_errors import Untraceable

#: From this capability on, the head's gradient is summed in place (get_device_capability(...)[0] >= 8).
SUMS_IN_PLACE = (8, 0)
_16_BIT = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Calls:
    """Which of Liger's functions a step has called."""

    is_chunked: bool = False  # sizes are step functions of the number of tokens


def find_liger() -> None:
    """Import liger-kernel if it is installed, so that calls of its losses can be traced."""
    with contextlib.suppress(ImportError):
        importlib.import_module("liger_kernel.ops")


@contextlib.contextmanager
def liger_losses(kind: DeviceKind, capability: tuple[int, int], autocast: Autocast) -> Iterator[Calls]:
    """Within the block, let liger-kernel's losses run on the meta device, if they have been imported."""
    calls = Calls()
    if not kind.traits.has_triton or "liger_kernel.ops" not in sys.modules:
        yield calls
        return
    ops = sys.modules["liger_kernel.ops"]

    def fused(ctx: Any, options: SimpleNamespace) -> tuple[Any, ...]:
        calls.is_chunked = True
        return fused_forward(ctx, options, capability=capability, autocast=autocast)

    with contextlib.ExitStack() as stack:
        for function, forward, backward in (
            (ops.LigerCrossEntropyFunction, cross_entropy_forward, cross_entropy_backward),
            (ops.LigerFusedLinearCrossEntropyFunction, fused, fused_backward),
        ):
            taking = _named(function.forward, forward)
            stack.enter_context(mock.patch.object(function, "forward", staticmethod(taking)))
            stack.enter_context(mock.patch.object(function, "backward", staticmethod(backward)))
        yield calls


def _named(original: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """Call `forward` with the arguments of `original` by name: their order differs between versions."""
    signature = inspect.signature(original)

    def called(ctx: Any, *args: Any) -> Any:
        bound = signature.bind(ctx, *args)
        bound.apply_defaults()
        ctx.num_inputs = len(args)
        return forward(ctx, SimpleNamespace(**bound.arguments))

    return called


def _refuse(options: SimpleNamespace, unlike: Mapping[str, Any]) -> None:
    for name, usual in unlike.items():
        if getattr(options, name, usual) not in (usual, None):
            raise Untraceable(
                f"Liger's cross entropy with {name}={getattr(options, name)}",
                "Leave the option out, or take torch's cross entropy.",
            )


def _extras(options: SimpleNamespace, rows: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Allocate the requested outputs besides the loss, one number per token."""
    wanted = {
        "return_z_loss": dtype,
        "return_token_accuracy": torch.float32,
        "return_predicted_tokens": torch.int64,
    }
    return [
        torch.zeros(rows, dtype=kind, device="meta") if getattr(options, name, False) else None
        for name, kind in wanted.items()
    ]


def _summed(extras: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    z_loss, accuracy, predicted = extras
    return [None if z_loss is None else z_loss.sum(), None if accuracy is None else accuracy.sum(), predicted]


# Cross entropy of given logits


def cross_entropy_forward(ctx: Any, options: SimpleNamespace) -> tuple[Any, ...]:
    _refuse(options, {"weight": None})
    logits, target = options._input, options.target
    losses = torch.zeros(len(logits), dtype=logits.dtype, device="meta")
    extras = _extras(options, len(logits), logits.dtype)
    mask = target != options.ignore_index
    mask.sum()
    (target * mask).max()
    (target * mask).min()
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    if options._input.requires_grad:
        ctx.save_for_backward(logits.detach())  # holds the gradient by now
    if options.reduction == "none":
        return losses, *extras
    return losses.sum(), *_summed(extras)


def cross_entropy_backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    if gradients[0].ndim:
        gradient = gradient * gradients[0].unsqueeze(1)
    return gradient, *[None] * (ctx.num_inputs - 1)


# The head and the loss, fused


def chunk_tokens(num_tokens: int, hidden: int, vocabulary: int, budget: int = 1) -> int:
    """Return the tokens per chunk, a power of two: logits take about `budget` times the hidden states."""
    per_chunk = -(-num_tokens // -(-vocabulary // (budget * hidden)))
    return min(1 << (per_chunk - 1).bit_length(), num_tokens)


def fused_forward(
    ctx: Any, options: SimpleNamespace, *, capability: tuple[int, int], autocast: Autocast
) -> tuple[Any, ...]:
    _refuse(options, {"ce_weight": None, "use_token_scaling": False, "ce_impl": None})
    if options.reduction == "none":
        _refuse(options, {"reduction": "mean"})
    hidden, weight, bias = options._input, options.weight, options.bias
    num_tokens = len(hidden)
    rows = chunk_tokens(
        num_tokens, hidden.shape[1], len(weight), getattr(options, "chunk_mem_const", None) or 1
    )
    grad_hidden = torch.zeros_like(hidden)
    grad_weight = grad_bias = None
    if hidden.requires_grad:
        if weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=options.accum_dtype or weight.dtype)
        if bias is not None:
            grad_bias = torch.zeros_like(bias, dtype=options.accum_dtype or bias.dtype)
    losses = torch.zeros(num_tokens, dtype=torch.float32, device="meta")
    extras = _extras(options, num_tokens, hidden.dtype)
    mask = options.target != options.ignore_index
    mask.sum()

    # One chunk represents all: each reuses the memory of the one before.
    computed = autocast.dtype if autocast.active else hidden.dtype
    is_in_place = hidden.dtype == weight.dtype == computed
    chunk = hidden[:rows]
    if is_in_place and (bias is None or bias.dtype == hidden.dtype):
        logits = torch.empty((rows, len(weight)), dtype=hidden.dtype, device="meta")
    else:
        logits = chunk @ weight.t()
        logits = logits if bias is None else logits + bias
    if hidden.requires_grad and not (is_in_place and logits.dtype == grad_hidden.dtype):
        logits @ weight
    if grad_weight is not None:
        _add_weight_gradient(grad_weight, logits, chunk, capability)
    if grad_bias is not None:
        logits.sum(dim=0)
    del logits, chunk

    loss = losses.sum()
    ctx.save_for_backward(
        grad_hidden.detach(),
        None if grad_weight is None else grad_weight.to(weight.dtype).detach(),
        None if grad_bias is None else grad_bias.to(bias.dtype).detach(),
    )
    return loss, *_summed(extras)


def _add_weight_gradient(
    grad_weight: torch.Tensor, logits: torch.Tensor, chunk: torch.Tensor, capability: tuple[int, int]
) -> None:
    if (
        capability >= SUMS_IN_PLACE
        and logits.dtype in _16_BIT
        and grad_weight.dtype in (torch.float32, logits.dtype)
    ):
        if chunk.dtype != logits.dtype:
            chunk.to(logits.dtype)
        return
    torch.mm(logits.t(), chunk).float()


def fused_backward(ctx: Any, *_: torch.Tensor) -> tuple[Any, ...]:
    hidden, weight, bias = ctx.saved_tensors
    return (hidden, weight, None, bias, *[None] * ctx.num_inputs)[: ctx.num_inputs]
