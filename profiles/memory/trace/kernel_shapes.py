"""Output shapes of operators whose meta kernels reject arguments that the devices' kernels accept."""

from __future__ import annotations

import math
from typing import Any

import torch

aten = torch.ops.aten

#: Rows of a grouped product's output are aligned to this many bytes (GroupedMMUtils.h).
GROUPED_MM_ALIGNMENT_BYTES = 16


def output_of(func: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    """Return the output of `func` on meta tensors; None where torch's own meta kernel works."""
    if func is aten._grouped_mm.default and args[0].device.type == "meta":
        return _grouped_mm(args[0], args[1], args[2] if len(args) > 2 else None)
    return None


def _grouped_mm(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """Return a grouped product; torch 2.13's meta kernel accepts only bf16, its device kernels fp32 too.

    `left` (S, K) and `right` (G, K, N) give (S, N); `left` (K, S) and `right` (S, N), whose S is cut into
    groups, give (G, K, N).
    """
    if left.dim() == 2 and right.dim() == 2:
        assert offsets is not None, "the ends of the groups"
        size = [offsets.shape[0], left.shape[0], right.shape[1]]
    elif left.dim() == 2:
        size = [left.shape[0], right.shape[2]]
    else:
        size = (
            [left.shape[0], left.shape[1], right.shape[-1]]
            if right.dim() == 3
            else [left.shape[1], right.shape[1]]
        )
    alignment = GROUPED_MM_ALIGNMENT_BYTES // left.element_size()
    row = -(-size[-1] // alignment) * alignment
    stride = [math.prod(size[i + 1 : -1]) * row for i in range(len(size) - 1)] + [1]
    return torch.empty_strided(size, stride, dtype=left.dtype, device=left.device)
