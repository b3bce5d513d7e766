"""Check the trained weights of a run: that adapters are fp32, and that training changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method
from autosft.workers.training.zero_masks import local

if TYPE_CHECKING:
    from autosft.studies.trial import TrialJob

#: How many tensors are compared, evenly spaced.  Odd, since adapters come in pairs (A, B, A, B, ...) of which
#: one may not change in the first steps.
_MAX_TENSORS = 63
#: A schedule begins and ends with tiny steps.
_MIN_STEPS = 2


class TrainedWeights:
    """The trained weights of a model at the start of training."""

    def __init__(self, model: torch.nn.Module, job: TrialJob, *, warmup_steps: int) -> None:
        """Compute digests of the weights, their sums and norms, on their devices."""
        trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        require_fp32(trained, job)
        stride = max(1, len(trained) // _MAX_TENSORS) | 1
        self._weights = [one for _, one in trained[::stride]]
        self._at_start = [digest(weight) for weight in self._weights]
        self._job, self._warmup_steps = job, warmup_steps
        self._has_changed = False

    def require_changed(self, *, first_step: int, step: int) -> None:
        """Raise UserError if no trained weight has changed since `first_step`.

        Warm-up steps do not count: they may be too small.
        """
        if self._has_changed or step < max(first_step, self._warmup_steps) + _MIN_STEPS:
            return
        self._has_changed = any(
            digest(one) != before for one, before in zip(self._weights, self._at_start, strict=True)
        )
        if not self._has_changed:
            raise UserError(
                f"after {step - first_step} steps at a learning rate of up to "
                f"{self._job.settings.learning_rate:g} no trained weight has changed: nothing is learned.",
                remedy="Use a larger --learning-rate; bf16 weights lose changes smaller than 1 in 256 "
                "(--precision bf16-autocast keeps them in fp32).",
            )


def require_fp32(trained: list[tuple[str, torch.nn.Parameter]], job: TrialJob) -> None:
    """Assert that trained weights are fp32.

    Exceptions are whole models in studies pinned to bf16, and adapters on 4-bit weights, which trl casts to
    bf16.
    """
    precision, method = job.pinned.precision, job.settings.method
    assert trained, "no parameter is trained"
    if precision.has_bf16_weights and method is not Method.LORA:
        return
    others = sorted({str(one.dtype) for _, one in trained if one.dtype is not torch.float32})
    assert not others, f"trained weights are fp32, not {', '.join(others)}"


def digest(weight: torch.Tensor) -> tuple[float, float]:
    """Return the sum and the norm of a weight, or of this rank's shard of it."""
    values = local(weight.detach())
    return (
        float(values.sum(dtype=torch.float64)),
        float(torch.linalg.vector_norm(values, dtype=torch.float64)),
    )
