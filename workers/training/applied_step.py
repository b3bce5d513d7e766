"""The first optimizer step of an attempt, compared with what was asked for.

Libraries have applied another rate than the one that they logged: a share of warm-up taken for a number of
steps, a rate remembered from before the schedule, steps inside the backward pass that no schedule reaches.
The loss shows none of it, and a study over learning rates is wrong.  `TrainedWeights` sees whether anything
changes in the end; this sees by how much at the beginning, while it costs seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from autosft.profiles.optimizers import OPTIMIZERS
from autosft.workers.training.zero_masks import local

if TYPE_CHECKING:
    from autosft.studies.trial import TrialJob
    from autosft.workers.training.trainer import Trainer

#: Tensors of which some values are compared, evenly over the model, and how many of each.
_MAX_TENSORS = 63
_MAX_VALUES = 1024
#: How far past its bound a weight may move: rounding, and Adam's epsilon.
_TOLERANCE = 1.02
#: Rates are compared to this share: torchao keeps them in fp32.
_RATE_TOLERANCE = 1e-5


class WrongStepError(Exception):
    """The optimizer did not do what was asked of it: the trial's result would be that of other settings."""


class AppliedStep:
    """The first optimizer step of an attempt; made when training begins, before any step."""

    def __init__(self, trainer: Trainer, job: TrialJob, *, is_fresh: bool) -> None:
        """Keep some of the weights.  Raises WrongStepError where trained weights share memory.

        `is_fresh`: nothing was resumed, so that the first step is bounded by the rate.
        """
        trained = [(name, one) for name, one in trainer.model.named_parameters() if one.requires_grad]
        require_own_memory(trained)
        stride = max(1, len(trained) // _MAX_TENSORS) | 1
        self._trainer, self._job, self._is_fresh = trainer, job, is_fresh
        self._trained = trained
        self._sampled = trained[::stride]
        self._before = [_some_of(one) for _, one in self._sampled]
        self._rate: float | None = None

    def before_step(self, step: int) -> None:
        """Compare the rates of all weights with the schedule's, once the gradients are there.

        `step` steps were taken before.  Raises WrongStepError.
        """
        owner: dict[int, float] = {}
        for group in self._trainer.optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in owner:
                    raise WrongStepError(
                        "a weight stands in the optimizer twice: each step would move it twice."
                    )
                owner[id(parameter)] = float(group["lr"])
        missing = [name for name, one in self._trained if id(one) not in owner]
        if missing and self._job.pinned.trainer is None:  # a user's may leave some out
            raise WrongStepError(
                f"the optimizer that follows the schedule holds {len(self._trained) - len(missing)} of "
                f"{len(self._trained)} trained weights; {missing[0]} is not among them."
            )
        if any(not torch.equal(_some_of(one), was) for (_, one), was in self._pairs()):
            if self._job.pinned.trainer is None or self._steps_in_backward():
                raise WrongStepError(
                    "weights moved inside the backward pass, before the optimizer's step: neither the "
                    "schedule nor clipping nor accumulation reach them."
                )
            self._before = [_some_of(one) for _, one in self._sampled]  # a user's trainer moves its own
        if self._job.pinned.trainer is not None:  # whose rates and schedule are its own
            return
        self._rate = scheduled_rate(self._job, self._trainer, step)
        wrong = [one for one in owner.values() if abs(one - self._rate) > _RATE_TOLERANCE * self._rate]
        if wrong:
            raise WrongStepError(
                f"the optimizer's rate at step {step + 1} is {wrong[0]:g}, the schedule's {self._rate:g}."
            )

    def after_step(self) -> None:
        """Compare how far the weights have moved with the rate.  Raises WrongStepError."""
        if self._rate is None or self._trainer.accelerator.optimizer_step_was_skipped:
            return
        row = OPTIMIZERS.get(self._job.settings.optimizer)
        units = None if row is None else row.first_move
        if self._rate > 0 and (units is None or not self._is_fresh):
            return
        allowed = self._rate * (units or 0.0)
        decay = self._rate * self._job.settings.weight_decay
        for (name, one), was in self._pairs():
            now = _some_of(one).float()
            size = was.float().abs()
            rounding = 2 * torch.finfo(one.dtype).eps * size
            excess = (now - was.float()).abs() - (_TOLERANCE * allowed + decay * size + rounding)
            if self._rate == 0 and not torch.equal(now, was.float()):
                raise WrongStepError(f"at a rate of 0 the first step moved {name}.")
            if self._rate > 0 and bool((excess > 0).any()):
                moved = float((now - was.float()).abs().max())
                raise WrongStepError(
                    f"the first step moved {name} by up to {moved:g}, which takes a rate above the "
                    f"schedule's {self._rate:g}."
                )

    def _pairs(self) -> Any:
        return zip(self._sampled, self._before, strict=True)

    def _steps_in_backward(self) -> bool:
        return any(getattr(one, "_post_accumulate_grad_hooks", None) for _, one in self._trained)


def scheduled_rate(job: TrialJob, trainer: Trainer, step: int) -> float:
    """Return the rate of the step after `step` others, from the settings alone."""
    from transformers import get_scheduler

    args = trainer.args
    probe = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        job.settings.lr_scheduler,
        optimizer=probe,
        num_warmup_steps=round(job.settings.warmup_ratio * args.max_steps),
        num_training_steps=args.max_steps,
    )
    factor: float = schedule.lr_lambdas[0](step)
    return job.settings.learning_rate * factor


def require_own_memory(trained: list[tuple[str, torch.nn.Parameter]]) -> None:
    """Raise WrongStepError where two trained weights lie in the same memory: it would be moved twice."""
    if found := shared_memory(trained):
        name, other = found
        raise WrongStepError(
            f"{name} and {other} are two trained weights in the same memory: each step would move it "
            "twice. Tied weights have to be one parameter (model.tie_weights())."
        )


def shared_memory(weights: Iterable[tuple[str, torch.Tensor]]) -> tuple[str, str] | None:
    """Return the names of two weights that lie in the same memory, None where all have their own."""
    places = []
    for name, one in weights:
        values = local(one.detach())
        if values.numel() == 0 or values.device.type == "meta":
            continue
        start = values.data_ptr()
        reach = sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
        places.append((str(values.device), start, start + (reach + 1) * values.element_size(), name))
    for (device, _, end, name), (other_device, start, _, other) in pairwise(sorted(places)):
        if device == other_device and start < end:
            return name, other
    return None


def _some_of(weight: torch.Tensor) -> torch.Tensor:
    values = local(weight.detach()).reshape(-1)
    return values[:: max(1, values.numel() // _MAX_VALUES)].clone()
