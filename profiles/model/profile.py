"""Read a model's shape from its configuration, without loading weights.

The model is a local folder, a repository of the Hugging Face hub, or a name in the shipped table of shapes
(data/models.json), which also covers well-known repositories while the hub cannot be reached.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autosft.profiles.answer_cache import AnswerCache, key_of
from autosft.profiles.errors import UserError
from autosft.profiles.model import quantization
from autosft.profiles.model.adapted_layers import ALL_LINEAR, share_weights, targets_in
from autosft.profiles.model.adapter_folder import TOKENIZER_FILES
from autosft.profiles.model.files import Located, locate
from autosft.profiles.model.model_class import (
    CODE_REVISION,
    CODE_SOURCE,
    attention_heads,
    build,
    config_of,
    depth_of,
    is_trainable,
    longest_position,
    other_towers,
    per_layer,
    repeated_layers,
    width_of,
)
from autosft.profiles.model.own_head import NOTE as OWN_HEAD
from autosft.profiles.model.own_head import has_own_head, untie
from autosft.profiles.model.weight_keys import check_checkpoint, is_composite
from autosft.profiles.recipe import AdapterSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGroup:
    """Linear layers that text passes through, of one name and shape; without the output head."""

    name: str  # last part of the module's name, as in LoRA targets: "q_proj"
    in_features: int
    out_features: int
    count: int
    active_share: float = 1.0  # share of them that a token passes through; below 1 for experts
    is_linear: bool = True  # a module that can be adapted; experts that share one weight cannot
    in_all_linear: bool = True  # whether "all-linear" includes them

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """What is known about a causal language model without its weights."""

    source: str  # as the user gave it; what from_pretrained takes, unless `has_weights` is false
    revision: str | None  # commit of the hub's repository, None for folders and the table
    fingerprint: str  # sha256 over configuration and weight files; see `load_model_profile`
    architecture: str  # class that trains, e.g. "LlamaForCausalLM"
    config_json: str  # canonical configuration; `load_config` makes it an object again
    num_parameters: int  # shared ones count once
    num_trainable: int  # by full fine-tuning: all that text passes through
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_positions: int  # 0: the model has no longest position
    num_attention_heads: int  # 0, with the next two: no layer has attention
    num_key_value_heads: int
    head_dim: int  # the largest, where layers differ
    has_tied_embeddings: bool
    linear_groups: tuple[LinearGroup, ...]
    dtype: str  # of the stored weights: "float32", "bfloat16", ...
    has_weights: bool
    has_tokenizer: bool
    has_chat_template: bool
    trust_remote_code: bool
    note: str | None  # for the user: where the shape comes from, and what is not trained
    attention: str = "sdpa"  # transformers' attn_implementation: "eager" if the model supports no other
    adapter: AdapterSettings | None = None  # of an adapter's folder that training continues from
    quantization: str | None = None  # how the weights are stored: a key of quantization.SCHEMES


def load_model_profile(
    source: str,
    *,
    trust_remote_code: bool = False,
    need_tokenizer: bool = True,
    need_weights: bool = True,
    cache_dir: Path | None = None,
) -> ModelProfile:
    """Read the profile of a causal language model.

    `source` is a local folder, a hub id, or a name of the shipped table.  With `need_tokenizer` (training),
    tokenizer and weights must exist, or only the tokenizer (without `need_weights`) for planning with data;
    otherwise only the shape is needed.  If the hub cannot be reached, its cache and then the table are used,
    and `note` says so.

    The fingerprint is a sha256 of the canonical configuration and, by name, of the weight files: size and
    content of local ones (whole up to 64 MiB, above that the header and 16 evenly spaced MiB, so that a
    change between these goes unnoticed), the hub's checksum of remote ones.

    The profile is cached in `cache_dir`, under everything that determines it, since importing and building
    the model's class takes seconds.

    Local weights are compared with the model by name and shape (`weight_keys`).

    Raises UserError for weights that do not match the model or cannot be dequantized, for a folder without
    config.json, tokenizer or weights in a known format, for a model that is not a causal language model or
    needs code that is not trusted, and for an unknown name.
    """
    located = locate(source, for_training=need_tokenizer, need_weights=need_weights)
    for_training = need_tokenizer and need_weights
    config_file = Path(located.pretrained) / "config.json"
    if trust_remote_code or (located.config is None and not config_file.is_file()):
        return _profile(located, trust_remote_code=trust_remote_code, for_training=for_training)
    content = "" if located.config is not None else config_file.read_bytes()
    cache = AnswerCache(cache_dir)
    described = dataclasses.replace(located, names=frozenset())  # whose order differs between processes
    key = key_of("model", described, sorted(located.names), content, for_training)
    if (kept := cache.get(key, ModelProfile)) is not None:
        return kept
    profile = _profile(located, trust_remote_code=trust_remote_code, for_training=for_training)
    cache.put(key, profile)
    return profile


def load_config(profile: ModelProfile) -> PreTrainedConfig:
    """Return the configuration as transformers' object."""
    return config_of(profile.config_json, trust_remote_code=profile.trust_remote_code)


def build_on_meta(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of a configuration on torch's meta device: shapes without memory."""
    import torch

    with torch.device("meta"):
        return build(config, trust_remote_code=trust_remote_code)


def _profile(located: Located, *, trust_remote_code: bool, for_training: bool) -> ModelProfile:
    config = _load_config(located, trust_remote_code=trust_remote_code)
    _require_causal_lm(located, config)
    stored_as = quantization.require_trainable(
        located.source, quantization.quantization_of(config), is_read_here=for_training
    )
    model = _built(located, config, trust_remote_code=trust_remote_code)
    if located.weights:
        _check_weights(located, config, model, stored_as)
    has_head = (
        _is_here(located) and stored_as is None and _is_tied(model) and has_own_head(model, _files(located))
    )
    if has_head:
        untie(config)
        model = _built(located, config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    values = _values_of(config)
    num_heads, num_key_value_heads, head_dim = attention_heads(text)
    notes = (
        located.note,
        quantization.describe(stored_as),
        OWN_HEAD if has_head else None,
        *_what_is_not_trained(model),
    )
    return ModelProfile(
        source=located.source,
        revision=located.revision,
        fingerprint=_fingerprint(located, values),
        architecture=type(model).__name__,
        config_json=_canonical(located, values, stored_as, trust_remote_code=trust_remote_code),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        hidden_size=width_of(text) or int(model.get_input_embeddings().weight.shape[1]),
        num_layers=depth_of(config) or len(repeated_layers(model)),
        vocab_size=per_layer(text, "vocab_size") or int(model.get_input_embeddings().weight.shape[0]),
        max_positions=longest_position(text),
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        has_tied_embeddings=_is_tied(model),
        linear_groups=_linear_groups(model, text),
        dtype=located.stored_dtype or str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        has_weights=bool(located.weights),
        has_tokenizer=bool(located.names & set(TOKENIZER_FILES)),
        has_chat_template=located.has_chat_template,
        trust_remote_code=trust_remote_code,
        note=" ".join(note for note in notes if note) or None,
        adapter=located.adapter,
        quantization=stored_as,
        attention=str(getattr(model.config, "_attn_implementation", None) or "eager"),
    )


def _require_causal_lm(located: Located, config: PreTrainedConfig) -> None:
    if not is_trainable(config):
        stated = (config.architectures or [None])[0]
        raise UserError(
            f"--model {located.source} is a {stated or config.model_type}, not a causal language model.",
            remedy="Supervised fine-tuning needs a model that predicts the next token (…ForCausalLM).",
        )


def _built(located: Located, config: PreTrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """Build the model on the meta device.  Raises UserError if its class rejects the configuration."""
    try:
        return build_on_meta(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # model classes raise anything for inconsistent sizes
        raise UserError(
            f"--model {located.source} cannot be built from its config.json: {' '.join(str(error).split())}.",
            remedy="See whether this version of transformers knows the model.",
        ) from None


def _values_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the configuration without fields about its origin."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("transformers_version", CODE_SOURCE, CODE_REVISION)
    }


def _fingerprint(located: Located, values: Mapping[str, Any]) -> str:
    """Return sha256 (hex) over the configuration and the weight files; see `load_model_profile`."""
    content = [json.dumps(values, sort_keys=True), located.weights, *located.adapter_weights]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _canonical(
    located: Located, values: Mapping[str, Any], stored_as: str | None, *, trust_remote_code: bool
) -> str:
    """Return the configuration from which the model can be rebuilt, as JSON."""
    kept = dict(values)
    if stored_as != quantization.BNB_4BIT:  # QLoRA trains on these layers as they are stored
        kept.pop("quantization_config", None)
    if trust_remote_code and "auto_map" in kept:  # where the code is
        kept |= {CODE_SOURCE: located.pretrained, CODE_REVISION: located.revision}
    return json.dumps(kept, sort_keys=True)


def _load_config(located: Located, *, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    if located.config is not None:
        values = dict(located.config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    revision = located.revision if located.pretrained == located.source else None
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            located.pretrained, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except Exception as error:  # configuration classes raise anything for an invalid file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        needs_code = "trust_remote_code" in str(error)
        raise UserError(
            f"--model {located.source}: "
            + (
                "it contains code that has to be run."
                if needs_code
                else f"config.json cannot be read: {reason}"
            ),
            remedy="Review that code, then pass --trust-remote-code." if needs_code else None,
        ) from None
    return config


def _what_is_not_trained(model: PreTrainedModel) -> Iterator[str]:
    """Yield notes on weights that no method, or no adapter, trains."""
    elsewhere = [parameter for _, tower in other_towers(model) for parameter in tower.parameters()]
    towers = {id(parameter): parameter.numel() for parameter in elsewhere}
    if towers:
        yield (
            f"Text does not pass through {sum(towers.values()):,} of its parameters (images, sound): they "
            "stay as they are."
        )
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        yield (
            "Its experts share one weight a layer, which is no linear layer: full fine-tuning trains them, "
            "adapters leave them as they are, and QLoRA does not hold them in 4 bits."
        )
    if share_weights(model):
        yield (
            "Some of its layers share their weights, and an adapter changes each of these layers in its own "
            "way: it is kept beside the model, since it cannot be merged into it."
        )


def _check_weights(
    located: Located, config: PreTrainedConfig, model: PreTrainedModel, stored_as: str | None
) -> None:
    """Raise UserError if a local folder's weight files do not match the model."""
    is_readable = quantization.can_be_read(stored_as) and not (stored_as or "").startswith("bitsandbytes")
    if not (_is_here(located) and is_readable):
        return  # hub models are checked when loaded, as are layers that need bitsandbytes to build
    check_checkpoint(
        model,
        located.source,
        _files(located),
        quantization_config=quantization.dequantizing_config(stored_as),
        stored_quantization=quantization.quantization_of(config),
        composite=is_composite(config),
    )


def _is_here(located: Located) -> bool:
    """Whether weight files lie in a folder here, as `located` names them."""
    return Path(located.pretrained).is_dir() and bool(located.weights) and not located.is_converted


def _files(located: Located) -> list[Path]:
    return [Path(located.pretrained) / name for name, _ in located.weights]


def _is_tied(model: PreTrainedModel) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and embeddings is not None and head.weight is embeddings.weight


def _linear_groups(model: PreTrainedModel, text: PreTrainedConfig) -> tuple[LinearGroup, ...]:
    """Group the blocks' linear layers: nn.Linear, GPT-2's Conv1D, and experts in one 3-D weight."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    counts: Counter[tuple[str, int, int, float, bool, bool]] = Counter()
    head = model.get_output_embeddings()
    elsewhere = {id(module) for _, tower in other_towers(model) for module in tower.modules()}
    all_linear = targets_in(model, ALL_LINEAR)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if id(module) in elsewhere or module is head:
            continue
        is_adapted = all_linear == ALL_LINEAR or name in all_linear
        if isinstance(module, nn.Linear):
            counts[last, module.in_features, module.out_features, 1.0, True, is_adapted] += 1
        elif isinstance(module, Conv1D):
            counts[last, module.nx, module.nf, 1.0, True, is_adapted] += 1
        elif last == "experts":
            for part, weight in module.named_parameters(recurse=False):
                if weight.dim() == 3:  # (experts, out, in)
                    num_experts = weight.shape[0]
                    share = float(getattr(text, "num_experts_per_tok", None) or num_experts) / num_experts
                    counts[part, weight.shape[2], weight.shape[1], share, False, False] += num_experts
    return tuple(
        LinearGroup(
            name=name, in_features=inside, out_features=outside, count=count,
            active_share=share, is_linear=is_linear, in_all_linear=is_adapted,
        )
        for (name, inside, outside, share, is_linear, is_adapted), count in counts.items()
    )  # fmt: skip
