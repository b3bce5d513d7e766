"""The loss of a user's own function or trainer, as the memory model traces it on the meta device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from autosft.profiles.memory.untraced import Untraceable
from autosft.profiles.user_code import UserCode, load

Loss = Callable[[Any, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]

#: What a trainer may change besides its loss, and the trace would not see.
NOT_FOLLOWED = ("training_step", "create_optimizer", "create_optimizer_and_scheduler", "get_batch_samples")


def of_function(code: UserCode) -> Loss:
    """Return the loss that `workers.training` takes with `--loss`."""
    function = load(code, flag="--loss")

    def loss(model: Any, inputs: dict[str, torch.Tensor], num_items: torch.Tensor) -> torch.Tensor:
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        taken: torch.Tensor = function(outputs, inputs["labels"], num_items_in_batch=num_items)
        return taken

    return loss


def of_trainer(code: UserCode) -> Loss | None:
    """Return the loss that a trainer class takes; None when it takes trl's.

    Its `compute_loss` is called on an instance that has a model and nothing else of a run.  Raises
    Untraceable for a class that changes more than its loss.
    """
    from trl import SFTTrainer

    trainer = load(code, flag="--trainer")
    changed = [name for name in NOT_FOLLOWED if getattr(trainer, name) is not getattr(SFTTrainer, name)]
    if changed:
        raise Untraceable(
            f"{changed[0]}, which --trainer {code.name} overrides",
            "Override compute_loss alone, which is followed, or give the loss as a function with --loss.",
        )
    if trainer.compute_loss is SFTTrainer.compute_loss:
        return None

    def loss(model: Any, inputs: dict[str, torch.Tensor], num_items: torch.Tensor) -> torch.Tensor:
        instance = object.__new__(trainer)
        instance.__dict__.update(_parts_of_a_run(model))
        with mock.patch.object(torch.Tensor, "item", return_value=1):  # of metrics without values
            taken: torch.Tensor = instance.compute_loss(model, dict(inputs), num_items_in_batch=num_items)
        return taken

    return loss


def _parts_of_a_run(model: Any) -> dict[str, Any]:
    """Return the attributes of SFTTrainer that its own compute_loss reads."""
    return {
        "model": model,
        "args": SimpleNamespace(average_tokens_across_devices=True, loss_type="nll", max_length=None),
        "accelerator": SimpleNamespace(
            num_processes=1, parallelism_config=None, gather_for_metrics=lambda tensor: tensor
        ),
        "aux_loss_enabled": False,
        "compute_loss_func": None,
        "label_smoother": None,
        "get_tp_size": lambda: 1,
        "_tp_size": 1,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
    }
