"""Count the parameters that an adapter trains."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapters import peft_config, require_no_head
from autosft.profiles.recipe import AdapterSettings


@functools.lru_cache(maxsize=64)
def num_trained(config_json: str, adapter: AdapterSettings, *, trust_remote_code: bool) -> int:
    """Count the parameters that an adapter trains, on a shallow copy of the model without weights.

    Raises UserError for an adapter that does not fit the model's layers.
    """
    import torch

    from autosft.profiles.memory.trace.meta_adapters import adapt
    from autosft.profiles.memory.trace.shallow_model import shallow_model
    from autosft.profiles.model.model_class import build, repeated_layers

    shallow = shallow_model(config_json, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            base: Any = build(copy.deepcopy(shallow.config), trust_remote_code=trust_remote_code)
        model = adapt(base, adapter, peft_config(adapter, base), "meta")
        require_no_head(base)
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--adapter {adapter.kind} does not fit this model: {error}",
            remedy="Give it the options that it needs (--adapter KIND,NAME=VALUE), or choose another.",
        ) from error
    layers = repeated_layers(base)
    trained: dict[int, int] = {
        id(parameter): parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    }
    in_layers = [{id(parameter) for parameter in layer.parameters()} & trained.keys() for layer in layers]
    shared = {key for a, b in itertools.combinations(in_layers, 2) for key in a & b}
    own = [sum(trained[key] for key in layer - shared) for layer in in_layers]
    return sum(trained.values()) - sum(own) + sum(own[kind] for kind in shallow.layer_kinds)
