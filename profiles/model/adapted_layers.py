"""Resolve "all-linear" to a model's linear layers, where peft's own choice would not train or not run.

Excluded are linear layers in parts that text does not pass through, a model's own classes of linear layers
(Llama 4's router returns two tensors), and those of state-space layers whose weights are read instead of
called, which would bypass an adapter.  Experts that share one weight are not linear layers, and "all-linear"
excludes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from autosft.profiles.model.model_class import other_towers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
#: Where the classes of transformers' models, and those of a trusted folder, are defined.
_MODEL_PACKAGES = ("transformers.models.", "transformers_modules.")


def targets_in(model: PreTrainedModel, targets: tuple[str, ...] | str) -> list[str] | str:
    """Return the targets of an adapter in a model, in peft's form."""
    if targets != ALL_LINEAR:
        return targets if isinstance(targets, str) else list(targets)
    left_out = set(_left_out(model))
    if not left_out:
        return ALL_LINEAR
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and name not in left_out
    ]


def read_directly(model: nn.Module) -> Iterator[str]:
    """Yield the linear layers whose weights a state-space layer passes to kernels instead of calling them.

    All but the first: transformers' Mamba classes pass x_proj, dt_proj and out_proj to the kernels, and
    without kernels still multiply by `dt_proj.weight`.  Such layers can neither be adapted nor quantized.
    """
    for name, module in model.named_modules():
        if _is_state_space(module):
            children = dict(module.named_children())
            children.pop("in_proj", None)
            yield from (f"{name}.{last}" for last, child in children.items() if _is_linear(child))


def _left_out(model: PreTrainedModel) -> Iterator[str]:
    elsewhere = {id(module) for _, tower in other_towers(model) for module in tower.modules()}
    yield from read_directly(model)
    for name, module in model.named_modules():
        if _is_linear(module) and (id(module) in elsewhere or _has_own_forward(module)):
            yield name


def _is_linear(module: nn.Module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _has_own_forward(module: Any) -> bool:
    return any(
        "forward" in vars(base) and base.__module__.startswith(_MODEL_PACKAGES)
        for base in type(module).__mro__
    )


def _is_state_space(module: nn.Module) -> bool:
    """Return whether a module is one of Mamba's: with a decay, a skip connection and a convolution."""
    has = [getattr(module, name, None) is not None for name in ("A_log", "D", "conv1d", "out_proj")]
    return all(has)


def share_weights(model: PreTrainedModel) -> bool:
    """Return whether several linear layers have one weight (Zamba 2's blocks), as head and embeddings may."""
    linear = [module for module in model.modules() if _is_linear(module) and hasattr(module, "weight")]
    return len({id(module.weight) for module in linear}) < len(linear)
