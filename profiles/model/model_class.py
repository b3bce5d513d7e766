"""Load configurations and build their model classes: transformers' own, or a trusted folder's.

Vision-language checkpoints are trained on text: the whole model is built, so that the saved weights match the
loaded ones, and everything that text does not pass through is frozen.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

#: The field with the folder of trusted code in a configuration's JSON (`PreTrainedConfig.name_or_path`).
CODE_SOURCE = "_name_or_path"
CODE_REVISION = "_commit_hash"
#: Names of the cap on logits besides `final_logit_softcapping`.
_SOFT_CAPS = ("logits_soft_cap", "output_logit_soft_cap")
#: Names of the width of hidden states.
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "model_dim")
#: Names of the field with the number of layers.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def config_of(config_json: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return transformers' configuration object of a `ModelProfile.config_json`.

    With `trust_remote_code`, a class of the model's own folder is loaded, which runs its code, if the
    configuration names one.  Raises ValueError for a model type unknown to transformers.
    """
    from transformers import AutoConfig

    values = json.loads(config_json)
    reference = (values.get("auto_map") or {}).get("AutoConfig")
    if trust_remote_code and reference is not None and values.get(CODE_SOURCE):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        source, revision = values.pop(CODE_SOURCE), values.pop(CODE_REVISION, None)
        made = get_class_from_dynamic_module(reference, source, revision=revision or "main")
        values.pop("model_type", None)
        config: PreTrainedConfig = made(**values)
        config.name_or_path = source
        return config
    known: PreTrainedConfig = AutoConfig.for_model(values.pop("model_type"), **values)
    return known  # typed


def auto_class(config: PreTrainedConfig) -> Any:
    """Return transformers' auto class for a configuration's model.

    AutoModelForImageTextToText for a vision-language checkpoint, AutoModelForCausalLM otherwise;
    `is_trainable` checks whether that knows the configuration.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _is_vision_language(config) else AutoModelForCausalLM


def auto_class_of(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return `auto_class` for a model folder, an adapter's folder (by its base model), or a hub id."""
    from pathlib import Path

    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = Path(source) / "adapter_config.json"
    if adapter.is_file() and not (Path(source) / "config.json").is_file():
        source = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path") or source
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return AutoModelForCausalLM  # which reports what is wrong with it
    return auto_class(config)


def is_trainable(config: PreTrainedConfig) -> bool:
    """Return whether transformers, or the configuration's own code, has a causal language model class."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) or _is_vision_language(config):
        return True
    stated = (config.architectures or [None])[0]
    fits = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    return fits and (not stated or stated in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _is_vision_language(config: PreTrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or config.is_encoder_decoder:
        return False
    if getattr(config, "text_config", None) is None:
        return False
    stated = (config.architectures or [None])[0]
    if stated is None:
        return type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return bool(stated == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type))


def build(config: PreTrainedConfig, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Build the model of a configuration for training, on torch's current device.

    `options` are those of `from_config`: dtype, attn_implementation.
    """
    model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **options)
    return ready_for_text(model)


def ready_for_text(model: PreTrainedModel) -> PreTrainedModel:
    """Prepare a model, built or loaded, for training on text; return it.

    What text does not pass through (vision and audio towers) is frozen.  transformers' Llama4ForCausalLM
    says that its backbone is `language_model`, and has it as `model`: trl's head needs the right name.  It
    caps logits by the name that most configurations have for it, and would leave out RecurrentGemma's cap.
    """
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"
    text: Any = model.config.get_text_config()
    for name in _SOFT_CAPS:
        if getattr(text, name, None) and getattr(text, "final_logit_softcapping", None) is None:
            text.final_logit_softcapping = getattr(text, name)
    if hasattr(text, "num_local_experts") and not hasattr(text, "num_experts"):
        # trl 1.16 reads `num_experts` for the routers' auxiliary loss; an alias is not saved.
        type(text).attribute_map = {**type(text).attribute_map, "num_experts": "num_local_experts"}
    for _, module in other_towers(model):
        module.requires_grad_(False)
    return model


def other_towers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return the parts of a vision-language model that text does not pass through, by name."""
    config = model.config
    if config.get_text_config() is config:
        return []
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(module) for module in decoder.modules()} | {id(head)}
    return [
        (name, module)
        for name, module in model.named_modules()
        if id(module) not in inside
        and not any(id(child) in inside for child in module.modules())
        and any(True for _ in module.parameters())
    ]


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers in order; [] if a model has no list of them.

    These are the outermost list of modules in the text decoder that is as long as the configuration's number
    of layers, or the longest list if that is not configured.
    """
    from torch import nn

    decoder: Any = getattr(model, "get_decoder", lambda: model)()
    depth = depth_of(getattr(model, "config", None))
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    for module in lists:
        if depth is not None and len(module) == depth:
            return list(module)
    return list(max(lists, key=len, default=[]))


def depth_of(config: Any) -> int | None:
    """Return a text model's number of layers by its configuration, None if it has no such field."""
    text = config.get_text_config() if config is not None else None
    for name in DEPTHS:
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
    return None


def attention_heads(text: PreTrainedConfig) -> tuple[int, int, int]:
    """Return a text model's numbers of attention heads and key-value heads, and the largest head size.

    Zeros for a model without attention.
    """
    heads = per_layer(text, "num_attention_heads", "n_head", "n_heads", "num_heads")
    if not heads or not _has_attention(text):
        return 0, 0, 0
    latent = per_layer(text, "qk_nope_head_dim") + per_layer(text, "qk_rope_head_dim")
    size = latent or per_layer(text, "head_dim") or width_of(text) // heads
    return heads, per_layer(text, "num_key_value_heads", "num_kv_heads") or heads, size


def width_of(text: PreTrainedConfig) -> int:
    """Return the width of a text model's hidden states, 0 where its configuration has another name for it."""
    return per_layer(text, *_WIDTHS)


#: Names of sizes of state-space models, which call their own heads `num_heads`.
_STATES_ONLY = ("state_size", "ssm_state_size")


def _has_attention(text: PreTrainedConfig) -> bool:
    own = any(getattr(text, name, None) is not None for name in _STATES_ONLY)
    return not own or hasattr(text, "num_attention_heads")


def per_layer(text: PreTrainedConfig, *names: str) -> int:
    """Return the largest value of one of these fields over the layers; 0 if there is none."""
    try:
        layers = list(getattr(text, "per_layer_config", None) or ()) or [text]
    except AttributeError:  # transformers asks for `num_hidden_layers`, which custom code may not have
        layers = [text]
    values = [getattr(layer, name, None) for layer in layers for name in names]
    return max((value for value in values if isinstance(value, int)), default=0)


def longest_position(text: PreTrainedConfig) -> int:
    """Return the longest sequence that a text model supports; 0 if it is not configured or unlimited."""
    if getattr(text, "alibi", False) or getattr(getattr(text, "attn_config", None), "alibi", False):
        return 0  # relative positions: transformers extends its table
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0
