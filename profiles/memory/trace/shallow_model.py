"""A model of the same shape with few layers, whose trace extends to the full depth."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ShallowModel:
    """A configuration cut down to the layers that differ, and which of them stands for which layer."""

    config: Any
    layer_kinds: tuple[int, ...]
    window: int | None  # shortest sliding window among the layers, None without one


def shallow_model(config_json: str) -> ShallowModel:
    """Keep the first and the last layer, and one inner layer of each kind.

    Kinds are told apart by the configuration's per-layer lists (`layer_types` and the like).
    """
    config = load_config(config_json)
    text = config.get_text_config()
    depth = int(text.num_hidden_layers)
    lists = {
        name: value
        for name, value in text.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == depth
    }
    signature = [json.dumps([value[j] for value in lists.values()]) for j in range(depth)]
    inner = {signature[j]: j for j in range(depth - 2, 0, -1)}  # first layer of each kind
    chosen = [0, *sorted(inner.values()), depth - 1]
    windows = _window(text, lists)
    if depth <= len(chosen):
        return ShallowModel(config=config, layer_kinds=tuple(range(depth)), window=windows)
    shallow = copy.deepcopy(config)
    shallow_text = shallow.get_text_config()
    for name, value in lists.items():
        setattr(shallow_text, name, [value[j] for j in chosen])
    shallow_text.num_hidden_layers = len(chosen)
    position = {signature[j]: index for index, j in enumerate(chosen) if 0 < index < len(chosen) - 1}
    kinds = (0, *(position[signature[j]] for j in range(1, depth - 1)), len(chosen) - 1)
    return ShallowModel(config=shallow, layer_kinds=kinds, window=windows)


def _window(text: Any, lists: dict[str, Any]) -> int | None:
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or getattr(text, "use_sliding_window", True) is False:
        return None
    types = lists.get("layer_types")
    return None if types is not None and not any("sliding" in str(one) for one in types) else window


def load_config(config_json: str) -> Any:
    """Return transformers' configuration object."""
    from transformers import AutoConfig

    values = json.loads(config_json)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def repeated_layers(model: torch.nn.Module, depth: int) -> Sequence[torch.nn.Module]:
    """Return the list of decoder layers: the first ModuleList of `depth` modules."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return list(module)
    raise LookupError(f"no list of {depth} layers in {type(model).__name__}")
