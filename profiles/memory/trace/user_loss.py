"""Trace the loss of a user's function on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autosft.profiles.memory.trace.host_memory import bounded
from autosft.profiles.user_code import UserCode, load

Loss = Callable[[Any, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]


def of_function(code: UserCode) -> Loss:
    """Return the loss that `workers.training` computes with `--loss`."""
    function = load(code, flag="--loss")

    def loss(model: Any, inputs: dict[str, torch.Tensor], num_items: torch.Tensor) -> torch.Tensor:
        outputs = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )
        with bounded():
            taken: torch.Tensor = function(outputs, inputs["labels"], num_items_in_batch=num_items)
        return taken

    return loss
