"""How many parameters a recipe trains."""

from __future__ import annotations

import functools
import itertools

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapters import peft_config, require_no_head
from autosft.profiles.recipe import AdapterSettings


@functools.lru_cache(maxsize=64)
def num_trained(config_json: str, adapter: AdapterSettings, *, trust_remote_code: bool) -> int:
    """Count what an adapter trains, on a model of shapes without weights and with few of its layers.

    Raises UserError for an adapter that does not fit the model's layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from autosft.profiles.memory.trace.meta_adapters import adapt
    from autosft.profiles.memory.trace.shallow_model import repeated_layers, shallow_model

    shallow = shallow_model(config_json)
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(shallow.config, trust_remote_code=trust_remote_code)
        model = adapt(base, adapter, peft_config(adapter), "meta")
        require_no_head(base)
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--adapter {adapter.kind} does not fit this model: {error}",
            remedy="Give it the options that it needs (--adapter KIND,NAME=VALUE), or choose another.",
        ) from error
    layers = repeated_layers(base, int(shallow.config.get_text_config().num_hidden_layers))
    trained: dict[int, int] = {id(one): one.numel() for one in model.parameters() if one.requires_grad}
    in_layers = [{id(one) for one in layer.parameters()} & trained.keys() for layer in layers]
    shared = {one for a, b in itertools.combinations(in_layers, 2) for one in a & b}
    own = [sum(trained[one] for one in layer - shared) for layer in in_layers]
    return sum(trained.values()) - sum(own) + sum(own[kind] for kind in shallow.layer_kinds)
