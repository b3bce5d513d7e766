"""Implement `torch.einsum` of two operands with torch functions, so that autocast is emulated within it.

On the CPU, autocast has no kernel for einsum, only for the batched product at its end: operands are permuted
and copied in their own precision and cast only then (ATen/native/Linear.cpp: einsum, sumproduct_pair).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def einsum_of_two(
    cast: Callable[[torch.Tensor], torch.Tensor], equation: Any, *operands: Any
) -> torch.Tensor | None:
    """Return the product where einsum computes it as a batched product, else None.

    `cast` casts the operands of the batched product, as autocast does.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    names = inputs.split(",")
    if len(names) != 2 or any(len(set(term)) != len(term) for term in (*names, output)):
        return None
    sizes = [
        dict(zip(term, operand.shape, strict=True)) for term, operand in zip(names, operands, strict=True)
    ]
    summed = [name for name in dict.fromkeys(names[0] + names[1]) if name not in output]
    if not summed or any(sizes[0].get(name, 1) == 1 or sizes[1].get(name, 1) == 1 for name in summed):
        return None
    first = next((name for name in output if (name in names[0]) != (name in names[1])), None)
    if first is not None and first in names[1]:  # so that the product has the output's order of dimensions
        names, operands, sizes = names[::-1], operands[::-1], sizes[::-1]
    return _batched_product(cast, names, operands, sizes=sizes, output=output, summed=summed)


def _batched_product(
    cast: Callable[[torch.Tensor], torch.Tensor],
    names: list[str],
    operands: Any,
    *,
    sizes: list[dict[str, int]],
    output: str,
    summed: list[str],
) -> torch.Tensor:
    left, right = sizes
    wide = [{name for name in side if side[name] > 1} for side in sizes]
    both = [name for name in output if name in wide[0] and name in wide[1]]
    only_left = [name for name in output if name in wide[0] and name not in wide[1]]
    # a dimension of length 1 in both goes with the right one
    only_right = [name for name in output if name not in both and name not in only_left]

    def length(some: list[str]) -> int:
        return math.prod(max(left.get(name, 1), right.get(name, 1)) for name in some)

    def arranged(index: int, parts: tuple[list[str], ...]) -> torch.Tensor:
        order = [name for part in parts for name in part]
        present = [name for name in order if name in sizes[index]]
        permuted = operands[index].permute([names[index].index(name) for name in present])
        return permuted.reshape([length(part) for part in parts])  # type: ignore[no-any-return]

    rest = [name for name in names[0] if name not in (*both, *only_left, *summed)]  # of length 1
    first = arranged(0, (both, [*only_left, *rest], summed))
    second = arranged(1, (both, summed, only_right))
    product = torch.bmm(cast(first), cast(second))
    order = [*both, *only_left, *only_right]
    shaped = product.view([length([name]) for name in order])
    return shaped.permute([order.index(name) for name in output])
