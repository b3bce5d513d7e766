"""The part of a sharded model that is on this rank."""

from __future__ import annotations

import torch

#: The attribute of a sharded parameter with a parameter of the part that is on this rank.
_PART = "part_of_autosft"


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a sharded tensor (DTensor) that is on this rank, or the tensor itself."""
    part: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def trained_here(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the trained parameters; of sharded ones this rank's part, with its gradient.

    An optimizer runs the same operators on the parts as on the DTensors that they are of.
    """
    parameters = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        part = local_part(parameter)
        if part is parameter:
            parameters.append(parameter)
            continue
        made: torch.nn.Parameter | None = getattr(parameter, _PART, None)
        if made is None:
            made = torch.nn.Parameter(part)
            setattr(parameter, _PART, made)
        if parameter.grad is not None:
            made.grad, parameter.grad = local_part(parameter.grad), None
        parameters.append(made)
    return parameters
