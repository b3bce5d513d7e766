"""Build a small model of the same configuration with random weights, to check a converter on the family.

Windows and original contexts are shortened too, so that short prompts reach beyond them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from autosft.profiles.memory.trace.shallow_model import cut_to_layers, shallow_model
from autosft.profiles.model.model_class import build, config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WINDOW, _CONTEXT, _WIDTH, _EXPERTS = 32, 64, 128, 8
#: Not Llama 4's attention_chunk_size, which llama.cpp knows by heart.
_WINDOWS = ("sliding_window", "attention_window_size")
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def tiny_twin(config_json: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the small model: its first layers, narrow if its class allows that, else at full width."""
    values = first_layers(config_json, trust_remote_code=trust_remote_code)
    failure: Exception | None = None
    for smaller in (narrow(short(values)), short(values), values):
        try:
            config = config_of(json.dumps(smaller, default=str), trust_remote_code=trust_remote_code)
            torch.manual_seed(0)
            model = build(copy.deepcopy(config), trust_remote_code=trust_remote_code).float().eval()
            _draw(model)
            with torch.no_grad():
                model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
        except Exception as error:
            failure = error
            continue
        model.config.dtype = torch.float32
        return model
    assert failure is not None
    raise failure


def first_layers(config_json: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Cut a configuration to its first layers, as many as it takes to have one of each kind.

    Not to one of each kind, as a trace is: llama.cpp knows some families' order of layers by heart.
    """
    kinds = shallow_model(config_json, trust_remote_code=trust_remote_code).layer_kinds
    inner = kinds[1:-1]
    number = max((inner.index(kind) + 2 for kind in set(inner)), default=len(kinds))
    config = config_of(config_json, trust_remote_code=trust_remote_code)
    whole = {**json.loads(config_json), **config.to_dict()}
    if number >= len(kinds):
        return whole
    try:
        return cut_to_layers(whole, config, range(number))
    except LookupError:  # a text model under a name that is not known
        return whole


def short(values: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten windows and original contexts, with the same ratio to the longest position."""
    return _in_text(values, _short)


def narrow(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make layers narrower: fewer heads of the same size, fewer experts."""
    return _in_text(values, _narrow)


def _in_text(values: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    if "text_config" in values:
        return {**values, "text_config": change(dict(values["text_config"]))}
    return change(dict(values))


def _short(text: dict[str, Any]) -> dict[str, Any]:
    for name in _WINDOWS:
        if isinstance(text.get(name), int) and text[name] > _WINDOW:
            text[name] = _WINDOW
    longest = text.get("max_position_embeddings")
    ropes = list(_ropes(text))
    originals = [
        rope["original_max_position_embeddings"]
        for rope in ropes
        if rope.get("original_max_position_embeddings")
    ]
    if originals and longest:
        shrink = _CONTEXT / max(originals)
        if shrink < 1:
            text["max_position_embeddings"] = max(_CONTEXT, round(longest * shrink))
            if text.get("original_max_position_embeddings"):
                text["original_max_position_embeddings"] = _CONTEXT
            for rope in ropes:
                if rope.get("original_max_position_embeddings"):
                    rope["original_max_position_embeddings"] = _CONTEXT
    elif longest and longest > _CONTEXT and any(rope.get("rope_type") == "dynamic" for rope in ropes):
        text["max_position_embeddings"] = _CONTEXT
    return text


def _ropes(text: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Replace the rotary settings in `text` by copies, and yield these: one, or one per kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = copy.deepcopy(text.get(name))
        if not isinstance(rope, dict) or not rope:
            continue
        text[name] = rope
        inner = [value for value in rope.values() if isinstance(value, dict)]
        yield from inner or [rope]


def _narrow(text: dict[str, Any]) -> dict[str, Any]:
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    if not heads or not hidden or hidden <= 2 * _WIDTH:
        return text
    groups = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or hidden // heads
    few = min(groups, 2)
    text["num_attention_heads"] = few * min(heads // groups, 4)
    if text.get("num_key_value_heads"):
        text["num_key_value_heads"] = few
    text["hidden_size"] = text["num_attention_heads"] * head_dim
    for name, value in text.items():
        if name.endswith("intermediate_size") and isinstance(value, int):
            text[name] = min(value, 2 * _WIDTH)
        elif name in _NUM_EXPERTS and isinstance(value, int):
            text[name] = min(value, _EXPERTS)
    return text


def _draw(model: torch.nn.Module) -> None:
    """Draw weights for which logits differ between tokens, unlike those of a usual initialisation."""
    drawn = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        with torch.no_grad():
            if leaf in ("bias", "sinks"):
                parameter.normal_(0.0, 0.1, generator=drawn)
            elif parameter.dim() == 1 and leaf == "weight":
                parameter.mul_(torch.empty_like(parameter).uniform_(0.8, 1.2, generator=drawn))
            elif parameter.dim() >= 2 and ("weight" in leaf or leaf.endswith("_proj")):
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter.shape[-1]), generator=drawn)
