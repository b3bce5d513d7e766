"""Reduce a model to its distinct layers, which are traced in place of its full depth.

Layers are equal if they have the same modules with the same sizes and settings, which is checked on the model
itself, built without weights.  The configuration is reduced by cutting its per-layer lists; if the result
does not have the intended layers, the full depth is traced.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autosft.profiles.model.model_class import DEPTHS, build, config_of, depth_of, repeated_layers

#: Fields that hold indices of layers, reduced to the layers that are kept.
_LAYER_NUMBERS = (
    "moe_layers", "attn_layer_indices", "mlp_only_layers", "full_attn_idxs", "attn_layers_indices",
)  # fmt: skip
#: Fields with a pattern that is repeated over the layers.
_PATTERNS = ("block_types",)
#: Fields with the number of first layers that are of another kind.
_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShallowModel:
    """A configuration reduced to distinct layers, and which of them represents each original layer."""

    config: Any
    layer_kinds: tuple[int, ...]
    window: int | None  # shortest sliding window among the layers, None without one
    chunk: int = 0  # tokens that state-space layers compute at a time, 0 without such layers


@functools.lru_cache(maxsize=16)
def shallow_model(config_json: str, *, trust_remote_code: bool = False) -> ShallowModel:
    """Keep the first and the last layer, and one inner layer of each kind; all layers where that fails."""
    config = config_of(config_json, trust_remote_code=trust_remote_code)
    model = _on_meta(config, trust_remote_code)
    signatures = _signatures(repeated_layers(model))
    depth = len(signatures)
    text = config.get_text_config()
    full = ShallowModel(
        config=config, layer_kinds=tuple(range(depth)), window=_window(text), chunk=_chunk(text)
    )
    inner = {signatures[j]: j for j in range(depth - 2, 0, -1)}  # first layer of each kind
    chosen = [0, *sorted(inner.values()), depth - 1]
    if depth <= len(chosen):
        return full
    try:
        shallow = config_of(
            json.dumps(cut_to_layers(json.loads(config_json), config, chosen)),
            trust_remote_code=trust_remote_code,
        )
        built = _on_meta(shallow, trust_remote_code)
        layers = repeated_layers(built)
    except Exception:  # classes raise anything for fields that do not match
        return full
    is_cut_right = _signatures(layers) == [signatures[j] for j in chosen]
    if not is_cut_right or _outside(built, layers) != _outside(model, repeated_layers(model)):
        return full
    position = {signatures[j]: index for index, j in enumerate(chosen) if 0 < index < len(chosen) - 1}
    kinds = (0, *(position[signatures[j]] for j in range(1, depth - 1)), len(chosen) - 1)
    return dataclasses.replace(full, config=shallow, layer_kinds=kinds)


@functools.lru_cache(maxsize=4)
def full_model(config_json: str, *, trust_remote_code: bool = False) -> ShallowModel:
    """Return the model at full depth, each layer representing itself."""
    shallow = shallow_model(config_json, trust_remote_code=trust_remote_code)
    config = config_of(config_json, trust_remote_code=trust_remote_code)
    return dataclasses.replace(shallow, config=config, layer_kinds=tuple(range(len(shallow.layer_kinds))))


def load_config(config_json: str, *, trust_remote_code: bool = False) -> Any:
    """Return transformers' configuration object."""
    return config_of(config_json, trust_remote_code=trust_remote_code)


def _on_meta(config: Any, trust_remote_code: bool) -> Any:
    with torch.device("meta"):
        return build(copy.deepcopy(config), trust_remote_code=trust_remote_code)


def _outside(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> list[tuple[str, tuple[int, ...]]]:
    """Return names and shapes of the parameters outside the layers."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return [
        (name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if id(parameter) not in inside
    ]


def _signatures(layers: Sequence[torch.nn.Module]) -> list[str]:
    """Return a description of each layer, equal for layers that run the same operators."""
    described = [dict(_described(layer)) for layer in layers]
    names = {name for layer in described for name in layer}
    numbers = {name for name in names if _is_number_of_layer([layer.get(name) for layer in described])}
    return [
        json.dumps(sorted((name, repr(value)) for name, value in layer.items() if name not in numbers))
        for layer in described
    ]


def _described(layer: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in layer.named_modules():
        yield path, type(module).__qualname__
        for name, tensor in itertools.chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        ):
            yield f"{path}.{name}", (tuple(tensor.shape), tensor.dtype)
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, str | int | float | tuple | list | None):
                # Of factors such as dropout, only zero or not matters.
                yield f"{path}:{name}", value != 0 if isinstance(value, float) else value


def _is_number_of_layer(values: Sequence[Any]) -> bool:
    """Return whether a setting is just the layer's index, which does not change its operators."""
    known = [
        (j, value) for j, value in enumerate(values) if isinstance(value, int) and not isinstance(value, bool)
    ]
    if len(known) < 2:
        return False
    shift = known[0][1] - known[0][0]
    return len(known) == sum(value is not None for value in values) and all(v - j == shift for j, v in known)


def cut_to_layers(values: dict[str, Any], config: Any, chosen: Sequence[int]) -> dict[str, Any]:
    """Return a configuration's fields, reduced to the chosen layers."""
    is_nested = config.get_text_config() is not config
    names = [name for name in ("text_config", "llm_config", "thinker_config") if name in values]
    if is_nested and not names:
        raise LookupError("the text model's configuration has no known name")
    text = dict(values[names[0]]) if is_nested else dict(values)
    before = config.get_text_config()
    for name, value in before.to_dict().items():
        if name in _LAYER_NUMBERS and value is not None:
            text[name] = [i for i, j in enumerate(chosen) if j in value]
        elif name in _PATTERNS and value:
            text[name] = [value[j % len(value)] for j in chosen]
        elif isinstance(value, list | tuple) and len(value) == depth_of(config):
            text[name] = [value[j] for j in chosen]
        elif name in _FIRST_LAYERS and value is not None:
            text[name] = sum(j < value for j in chosen)
        elif name == "per_layer_config" and isinstance(value, dict):
            by_layer = {int(j): fields for j, fields in value.items()}
            text[name] = {i: by_layer[j] for i, j in enumerate(chosen) if j in by_layer}
    for name in DEPTHS:
        if name in text:
            text[name] = len(chosen)
    return {**values, names[0]: text} if is_nested else text


def _window(text: Any) -> int | None:
    """Return the shortest length in tokens at which the attention of a layer changes."""
    types = getattr(text, "layer_types", None)
    found = []
    for name, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")):
        value = getattr(text, name, None)
        is_used = types is None or any(kind in str(layer_type) for layer_type in types)
        if isinstance(value, int) and is_used and getattr(text, "use_sliding_window", True) is not False:
            found.append(value)
    return min(found, default=None)


def _chunk(text: Any) -> int:
    """Return how many tokens state-space layers compute at a time."""
    sizes = (getattr(text, name, None) for name in ("mamba_chunk_size", "chunk_size"))
    return next((size for size in sizes if isinstance(size, int)), 0)
