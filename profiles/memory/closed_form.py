"""Estimate the peak memory of a training step in closed form: no torch, microseconds, a wide bound.

Used where a model cannot be traced, and as a sanity check of traces.  The terms are those of Korthikanti et
al. 2022 (activations of a transformer layer), adapted to models without dropout, with grouped queries and a
gated feed-forward, and to trl's chunked head, which never holds the logits of a whole batch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from autosft.profiles.hardware.device_kinds import DeviceKind
from autosft.profiles.recipe import (
    ByteRange,
    Checkpointing,
    LengthProfile,
    MemoryEstimate,
    Method,
    Precision,
    Sharding,
    StepRecipe,
)
from autosft.profiles.units import gib

#: trl's chunked head uses tiles of at most this many tokens by this many vocabulary entries.
HEAD_TILE_TOKENS = 4096
HEAD_TILE_VOCABULARY = 32768
#: The bound of the closed form; published closed forms underestimate by up to 69 % (docs/memory.md).
UPPER_FACTOR = 1.5
UPPER_OFFSET_BYTES = 256 << 20

_OPTIMIZER_BYTES_PER_PARAMETER = {  # others: AdamW's two moments, which depend on the precision
    "sgd": 0.0,
    "adafactor": 0.02,
    "adamw_torch_8bit": 2.04,
    "adamw_torch_4bit": 1.04,
    "lion_8bit": 1.02,
    "lion_32bit": 4.0,
    "adamw_8bit": 2.04,
    "adamw_bnb_8bit": 2.04,
    "paged_adamw_8bit": 0.0,  # managed memory, outside the allocator
    "paged_adamw_32bit": 0.0,
    "paged_adamw": 0.0,
    "paged_lion_8bit": 0.0,
    "paged_lion_32bit": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The dimensions of a decoder that determine its memory, read from its configuration."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    gated: bool
    num_experts: int

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        feed_forward = (3 if self.gated else 2) * self.hidden * self.intermediate * self.num_experts
        return attention + feed_forward + 2 * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.num_layers * self.layer_parameters + embeddings + self.hidden


def decoder_shape(config_json: str) -> DecoderShape:
    """Read a transformers configuration, including the key names of the GPT-2 family."""
    config: dict[str, Any] = json.loads(config_json)
    config = {**config, **(config.get("text_config") or {})}

    def first(*names: str, default: Any) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), default)

    hidden = first("hidden_size", "n_embd", "d_model", default=768)
    num_heads = first("num_attention_heads", "n_head", default=12)
    model_type = str(config.get("model_type", ""))
    plain = model_type in {"gpt2", "gpt_neox", "gptj", "gpt_neo", "phi", "opt", "bloom", "falcon"}
    return DecoderShape(
        num_layers=first("num_hidden_layers", "n_layer", default=12),
        hidden=hidden,
        intermediate=first("moe_intermediate_size", "intermediate_size", "n_inner", default=4 * hidden),
        num_heads=num_heads,
        num_kv_heads=first("num_key_value_heads", default=num_heads),
        head_dim=first("head_dim", default=hidden // num_heads),
        vocabulary=first("vocab_size", default=50257),
        tied=first("tie_word_embeddings", default=model_type in {"gpt2", "gemma", "gemma2", "gemma3_text"}),
        gated=not plain,
        num_experts=first("num_local_experts", "num_experts", default=1) or 1,
    )


def trainable_parameters(shape: DecoderShape, recipe: StepRecipe) -> int:
    """Count the trained parameters: all, or rank x (in + out) of each adapted projection."""
    if recipe.adapter is None:
        return shape.parameters
    hidden, q, kv = shape.hidden, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    width = {
        "q_proj": hidden + q,
        "k_proj": hidden + kv,
        "v_proj": hidden + kv,
        "o_proj": q + hidden,
        "gate_proj": hidden + shape.intermediate,
        "up_proj": hidden + shape.intermediate,
        "down_proj": hidden + shape.intermediate,
    }
    targets = width if isinstance(recipe.adapter.targets, str) else recipe.adapter.targets
    widths: int = sum(width.get(name, 2 * hidden) for name in targets)
    return shape.num_layers * recipe.adapter.rank * widths


def closed_form(
    config_json: str,
    recipe: StepRecipe,
    micro_batch: int,
    lengths: LengthProfile,
    device_kind: DeviceKind,
    *,
    outside_bytes: int = 0,
) -> MemoryEstimate:
    """Estimate by formula; the upper bound is 1.5 times the median plus a constant.

    Assumes `micro_batch` examples as long as the longest.  Limits: mixture-of-experts routing, state-space
    layers and other special blocks are treated as plain decoder layers.
    """
    shape = decoder_shape(config_json)
    tokens = micro_batch * lengths.longest
    compute_bytes = 4 if recipe.precision is Precision.FP32 else 2
    parameters, gradients, optimizer = _state_bytes(shape, recipe)
    activations = _activation_bytes(
        shape, recipe, device_kind, tokens=tokens, longest=lengths.longest, element=compute_bytes
    )
    head = _head_bytes(shape, recipe, device_kind, tokens=tokens, element=compute_bytes)
    components = (
        ("parameters", int(parameters)),
        ("gradients", int(gradients)),
        ("optimizer state", int(optimizer)),
        ("activations", int(activations)),
        ("logits and loss", int(head)),
        ("inputs", tokens * 24 * recipe.gradient_accumulation),
        ("workspace", device_kind.traits.closed_form_workspace_bytes),
    )
    median = sum(size for _, size in components)
    upper = int(median * UPPER_FACTOR) + UPPER_OFFSET_BYTES
    owner, size = max(components, key=lambda item: item[1])
    phase = "layer backward" if activations >= head else "loss backward"
    return MemoryEstimate(
        allocated=ByteRange(median_bytes=median, upper_bytes=upper),
        need=ByteRange(median_bytes=int(median * 1.05), upper_bytes=upper),
        uncapped=ByteRange(median_bytes=int(median * 1.3), upper_bytes=2 * upper),
        outside_bytes=outside_bytes,
        components=components,
        peak_phase=phase,
        peak_owner=f"the {owner}, {gib(size)} by formula",
        method="closed form",
        bound_level=0.9,
        num_calibration_rows=0,
        untraced=(),
    )


def _state_bytes(shape: DecoderShape, recipe: StepRecipe) -> tuple[float, float, float]:
    """Return the bytes of parameters, gradients and optimizer state on one device."""
    trainable = trainable_parameters(shape, recipe)
    shards = recipe.data_parallel if recipe.sharding is Sharding.FSDP else 1
    weight_bytes = recipe.precision.weight_bytes
    trainable_bytes = weight_bytes if recipe.method in (Method.FULL, Method.SPARSE) else 4
    frozen_bytes = 0.55 if recipe.method is Method.QLORA else weight_bytes
    frozen = shape.parameters if recipe.adapter is not None else 0
    parameters = (frozen * frozen_bytes + trainable * trainable_bytes) / shards
    gradients = trainable * trainable_bytes / shards
    state_per_parameter = _OPTIMIZER_BYTES_PER_PARAMETER.get(recipe.optimizer, 2.0 * trainable_bytes)
    return parameters, gradients, trainable * state_per_parameter / shards


def _activation_bytes(
    shape: DecoderShape, recipe: StepRecipe, kind: DeviceKind, *, tokens: int, longest: int, element: int
) -> float:
    """Return the bytes that all layers save for the backward pass."""
    # Autocast keeps a 16-bit copy of each weight until the end of the forward pass.
    mixed = recipe.precision in (Precision.BF16_AUTOCAST, Precision.FP16_AUTOCAST)
    copies = shape.parameters * 2 if mixed and recipe.method is not Method.QLORA else 0
    layer = _layer_activation_bytes(shape, recipe, kind, tokens=tokens, longest=longest, element=element)
    if recipe.checkpointing is Checkpointing.OFF:
        return shape.num_layers * layer + copies
    return shape.num_layers * tokens * shape.hidden * element + layer + copies


def _layer_activation_bytes(
    shape: DecoderShape, recipe: StepRecipe, kind: DeviceKind, *, tokens: int, longest: int, element: int
) -> float:
    """Return the bytes that one layer saves for its backward pass."""
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    norms = 2 * shape.hidden * (element + 4 + 4)  # normalised input, its fp32 copy, and the cast back
    attention = (2 * q + 2 * kv) + (
        2 * q + 2 * q
    )  # before and after the rotary embedding; repeated keys, values
    feed_forward = (4 if shape.gated else 2) * shape.intermediate
    saved = norms + (attention + feed_forward + 3 * shape.hidden) * element
    scores = 0.0
    if recipe.attention == "eager":
        scores = tokens * longest * shape.num_heads * (2 * element + 4)
    elif kind.traits.expands_attention_mask:
        scores = tokens * longest * 4 / shape.num_layers
    return tokens * saved + scores


def _head_bytes(
    shape: DecoderShape, recipe: StepRecipe, kind: DeviceKind, *, tokens: int, element: int
) -> float:
    """Return the bytes of trl's chunked head: tiles, and the fp32 gradient of a trained head."""
    tile = min(tokens, HEAD_TILE_TOKENS) * min(shape.vocabulary, HEAD_TILE_VOCABULARY)
    tiles = tile * element if kind.traits.has_triton else tile * (element + 6 * 4)
    trained = recipe.adapter is None
    return tiles + (shape.vocabulary * shape.hidden * 4 if trained else 0) + tokens * shape.hidden * 4
