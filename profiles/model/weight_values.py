"""Check that loaded weights are numbers, and not what a copy that broke off leaves behind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Layers that were added to a model may begin as zeros, and layers may be silenced: not most of a model.
_MAX_ZEROS = 0.5
_REMEDY = "Copy or download the model again, or give a checkpoint from before."


def require_values(model: PreTrainedModel, source: str) -> None:
    """Raise UserError where matrices of loaded weights are no numbers (NaN, infinite), or mostly zeros.

    One pass over the weights, without copies.  A file of full size that ends in zeros is what a download that
    broke off, or a disk that was full, leaves behind.
    """
    matrices = ((name, weight) for name, weight in model.named_parameters() if weight.dim() > 1)
    bounds = require_numbers_in(matrices, source)
    zeros = [name for name, (low, high) in bounds.items() if low == high == 0]
    if len(zeros) > _MAX_ZEROS * len(bounds):
        raise UserError(
            f"{source} holds {len(zeros)} matrices of {len(bounds)} that are nothing but zeros "
            f"({_first(zeros)}), as a download that broke off leaves behind.",
            remedy=_REMEDY,
        )


def require_numbers_in(
    weights: Iterable[tuple[str, torch.Tensor]], source: str
) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value of each weight.  Raises UserError for NaN and infinite ones."""
    bounds = {name: _bounds(weight) for name, weight in weights}
    broken = [name for name, (low, high) in bounds.items() if not abs(low) + abs(high) < float("inf")]
    if broken:
        raise UserError(
            f"{source} holds weights that are no numbers (NaN or infinite): {_first(broken)}.", remedy=_REMEDY
        )
    return bounds


def _bounds(weight: torch.Tensor) -> tuple[float, float]:
    """Return the smallest and the largest value, NaN if there is one; (1, 1) for codes and without data."""
    import torch

    local = weight.to_local() if hasattr(weight, "to_local") else weight  # of a sharded one, this rank's part
    is_plain = local.is_floating_point() and local.dtype.itemsize > 1 and not local.is_meta
    if not is_plain or not local.numel():
        return 1.0, 1.0
    low, high = torch.aminmax(local.detach())
    return float(low), float(high)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
