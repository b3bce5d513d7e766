"""What is trained in a run: held in fp32 where an adapter is trained, and seen to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method, Precision
from autosft.workers.training.zero_masks import local

if TYPE_CHECKING:
    from autosft.studies.trial import TrialJob

#: Tensors that are compared: all of so many, else every so-and-so-many-th.  Odd, since adapters come in pairs
#: (A, B, A, B, ...) of which the first may stand still in the first steps.
_MAX_TENSORS = 63
#: A schedule begins and ends with steps of next to nothing.
_MIN_STEPS = 2


class TrainedWeights:
    """The trained weights of a model, as they were when training began."""

    def __init__(self, model: torch.nn.Module, job: TrialJob, *, warmup_steps: int) -> None:
        """Take what identifies the weights: their sums and norms, on the devices where they are."""
        trained = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
        require_fp32(trained, job)
        stride = max(1, len(trained) // _MAX_TENSORS) | 1
        self._weights = [one for _, one in trained[::stride]]
        self._at_start = [digest(weight) for weight in self._weights]
        self._job, self._warmup_steps = job, warmup_steps
        self._has_changed = False

    def require_changed(self, *, first_step: int, step: int) -> None:
        """Raise UserError where no trained weight differs from what it was at `first_step`.

        Steps of the warm-up say nothing: they may be too small.
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
                remedy="Use a larger --learning-rate; of bf16 weights a smaller change than 1 in 256 is lost "
                "(--precision bf16-autocast keeps them in fp32).",
            )


def require_fp32(trained: list[tuple[str, torch.nn.Parameter]], job: TrialJob) -> None:
    """Check our own doing: what is trained is fp32.

    Apart from whole models that are trained in bf16 because the study says so, and the adapters over 4-bit
    weights, which trl makes bf16.
    """
    precision, method = job.pinned.precision, job.settings.method
    assert trained, "something is trained"
    if precision is Precision.BF16 and method is not Method.LORA:
        return
    others = sorted({str(one.dtype) for _, one in trained if one.dtype is not torch.float32})
    assert not others, f"trained weights are fp32, not {', '.join(others)}"


def digest(weight: torch.Tensor) -> tuple[float, float]:
    """Return the sum and the norm of a weight, of this rank's part of a sharded one."""
    values = local(weight.detach())
    return (
        float(values.sum(dtype=torch.float64)),
        float(torch.linalg.vector_norm(values, dtype=torch.float64)),
    )
