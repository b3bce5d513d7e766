"""Kernels that devices run in a step and the meta device lacks, one class for each kind of device."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F

from autosft.profiles.hardware.device_kinds import Capability, DeviceKind

aten = torch.ops.aten


class DeviceKernels(Protocol):
    """Allocates on the meta device what the kernels of one kind of device allocate."""

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        capability: Capability,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> tuple[torch.Tensor, ...] | None:
        """Call the fused kernel that `_fused_sdp_choice` picks; None where no fused kernel applies.

        `query`, `key`, `value`: (batch, heads, seq, width); `mask` is additive.
        """
        ...

    def scratch_bytes(self, func: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the sizes of what an operator allocates for itself and frees before it returns."""
        ...


class CpuKernels:
    """torch's kernels for the CPU."""

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        capability: Capability,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> tuple[torch.Tensor, ...] | None:
        if dropout_p != 0.0 or query.shape[-1] != value.shape[-1]:
            return None
        output: tuple[torch.Tensor, ...] = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale
        )
        return output

    def scratch_bytes(self, func: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
        return ()


class CudaKernels:
    """Flash and memory-efficient attention on NVIDIA GPUs."""

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        capability: Capability,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> tuple[torch.Tensor, ...] | None:
        output: tuple[torch.Tensor, ...]
        has_one_width = query.shape[-1] == value.shape[-1]
        if mask is None and has_one_width and _takes_flash(query, capability):
            output = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )
            return output
        if enable_gqa and key.shape[1] != query.shape[1]:
            return None
        bias = None if mask is None else _aligned(mask, query, key)
        keeps_sums = torch.is_grad_enabled() and query.requires_grad
        output = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, keeps_sums, dropout_p, is_causal, scale=scale
        )
        return output

    def scratch_bytes(self, func: Any, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the scratch of attention's backward kernels, from their sources.

        Flash attention's backward (flash_api.cpp, mha_bwd): the fp32 row sums, the fp32 accumulator of the
        query's gradient, and gradients of repeated keys and values where queries are grouped.  The efficient
        kernel's backward (attention_backward.cu): the row sums and, in 16 bits, an fp32 accumulator.
        """
        if func is aten._scaled_dot_product_flash_attention_backward.default:
            query, key = args[1], args[2]
            batch, heads, queries, dim = query.shape
            rows = -(-queries // 128) * 128
            sizes = [batch * heads * rows * 4, batch * heads * rows * _accumulated_width(dim) * 4]
            if key.shape[1] != heads:
                sizes += [batch * heads * key.shape[2] * dim * query.element_size()] * 2
            return tuple(sizes)
        if func.name() == "torch_attn::_varlen_attn_backward":
            # mha_varlen_bwd: the same for packed rows of examples, with 128 rows of padding after each
            query, key, starts = args[1], args[2], args[6]
            tokens, heads, dim = query.shape
            rows = tokens + 128 * (starts.shape[0] - 1)
            sizes = [heads * rows * 4, rows * heads * _accumulated_width(dim) * 4]
            if key.shape[1] != heads:
                sizes += [key.shape[0] * heads * dim * query.element_size()] * 2
            return tuple(sizes)
        if func is aten._scaled_dot_product_efficient_attention_backward.default:
            query = args[1]
            batch, heads, queries, dim = query.shape
            sizes = [batch * heads * queries * 4]
            if query.dtype is not torch.float32:
                sizes.append(batch * heads * -(-queries // 64) * 64 * -(-dim // 64) * 64 * 4)
            return tuple(sizes)
        return ()


#: The kernels of each kind of device; they have no state.
KERNELS: dict[DeviceKind, DeviceKernels] = {DeviceKind.CPU: CpuKernels(), DeviceKind.CUDA: CudaKernels()}


def _takes_flash(query: torch.Tensor, capability: Capability) -> bool:
    is_16_bit = query.dtype in (torch.float16, torch.bfloat16)
    has_flash = DeviceKind.CUDA.traits.has_flash_attention(capability)
    return is_16_bit and has_flash and query.shape[-1] <= 256


def _aligned(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Pad the bias to 8 columns, as `pad_bias` does before the efficient kernel, and expand it.

    Returns (batch, heads, queries, keys).
    """
    columns = mask.shape[-1]
    if columns % 8:
        mask = F.pad(mask, (0, 8 - columns % 8))[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _accumulated_width(dim: int) -> int:
    """Return the head size as flash attention's backward kernel rounds it up."""
    return -(-dim // 32) * 32 if dim <= 128 else -(-dim // 64) * 64
