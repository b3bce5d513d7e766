"""Tiny models of the families that people tune today: their real classes in transformers, a few layers deep.

`model_families.py` measures them for docs/models.md; tests take their models from here too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
#: Sizes of multi-head latent attention, whose values are narrower than its queries.
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DELTA = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
#: Of transformers' Mamba 2 layers as hybrids name them; the states are computed 16 tokens at a time.
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
TOKENS = {name: SIZES[name] for name in SIZES if name.endswith("token_id")}
#: Six layers: three of four are linear.
LINEAR_FULL = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models, and the configuration of a tiny one."""

    name: str
    models: str  # names of models that people know
    config: dict[str, Any]
    kind: str  # the group that it stands in: "attention", "experts", ...
    attention: str = "sdpa"  # "eager" where the class takes no other

    @property
    def config_json(self) -> str:
        return json.dumps(self.config)


def _family(kind: str, name: str, models: str, model_type: str, **changes: Any) -> Family:
    values = {"model_type": model_type, **SIZES, **changes}
    attention = values.pop("attention", "sdpa")
    config = {key: value for key, value in values.items() if value is not ...}
    return Family(name=name, models=models, config=config, kind=kind, attention=attention)


def _bare(
    kind: str, name: str, models: str, model_type: str, *, attention: str = "eager", **sizes: Any
) -> Family:
    """A family whose configuration has names of its own."""
    config = {"model_type": model_type, "vocab_size": 320, **TOKENS, **sizes}
    return Family(name=name, models=models, config=config, kind=kind, attention=attention)


def _vision(name: str, models: str, model_type: str, text: dict[str, Any], vision: dict[str, Any]) -> Family:
    config = {"model_type": model_type, "text_config": text, "vision_config": vision, **TOKENS}
    return Family(name=name, models=models, config=config, kind="vision and language")


_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 128,
}
_EXPERTS = "mixture of experts"
_MLA = "latent attention"
_LONG = "long positions"
_HYBRID = "linear and hybrid"
_STATES = "state space"
_TYPES = ["sliding_attention", "full_attention"] * 3

FAMILIES: tuple[Family, ...] = (
    _family("attention", "Llama", "Llama 2, 3; SmolLM2", "llama"),
    _family("attention", "Qwen 3", "Qwen3", "qwen3", head_dim=16),
    _family(_EXPERTS, "Mixtral", "Mixtral 8x7B", "mixtral", num_local_experts=4),
    _family(
        _EXPERTS, "Qwen 3 MoE", "Qwen3-30B-A3B", "qwen3_moe",
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    ),
    _family(
        _EXPERTS, "gpt-oss", "gpt-oss-20b", "gpt_oss", attention="eager",
        head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=_TYPES, sliding_window=32,
    ),
    _family(
        _EXPERTS, "Granite MoE", "Granite 3 MoE", "granitemoe", num_local_experts=4,
        num_experts_per_tok=2
    ),
    _family(
        _EXPERTS, "OLMoE", "OLMoE-1B-7B", "olmoe", num_experts=4, num_experts_per_tok=2,
    ),
    _family(
        _EXPERTS, "Llama 4", "Llama 4 Scout", "llama4_text",
        head_dim=16, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=128,
        interleave_moe_layer_step=2, attention_chunk_size=64,
    ),
    _family(_MLA, "MiniCPM 3", "MiniCPM3-4B", "minicpm3", **MLA),
    _family(
        _MLA, "DeepSeek V2", "DeepSeek-V2-Lite", "deepseek_v2",
        **MLA, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32,
        first_k_dense_replace=1, topk_method="greedy", head_dim=8,
    ),
    _family(
        _MLA, "DeepSeek V3", "DeepSeek-V3, R1; Moonlight, Kimi K2", "deepseek_v3",
        **MLA, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32,
        first_k_dense_replace=1, n_group=2, topk_group=1,
    ),
    _family(
        _MLA, "Kimi Linear", "Kimi-Linear-48B-A3B", "kimi_linear",
        **{**MLA, "q_lora_rank": None}, num_local_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        moe_intermediate_size=32, layer_types=LINEAR_FULL, num_hidden_layers=8, linear_head_dim=16,
        linear_num_heads=4,
    ),
    _family(
        _MLA, "GLM 4 MoE Lite", "GLM-4.7-Flash", "glm4_moe_lite",
        **MLA, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=32,
    ),
    _family(
        _LONG, "Phi 3, LongRoPE", "Phi-3-mini-128k, Phi-3.5", "phi3",
        rope_parameters=_LONGROPE, original_max_position_embeddings=128,
    ),
    _family(
        _LONG, "Phi 4 mini", "Phi-4-mini", "phi3",
        rope_parameters={**_LONGROPE, "partial_rotary_factor": 0.75, "short_factor": [1.0] * 6,
                         "long_factor": [4.0] * 6},
        original_max_position_embeddings=128, partial_rotary_factor=0.75, tie_word_embeddings=True,
    ),
    _family(
        _LONG, "Llama, dynamic NTK", "models with rope_type dynamic", "llama",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        max_position_embeddings=128,
    ),
    _family(
        _HYBRID, "Qwen 3.5", "Qwen3.5", "qwen3_5_text", **DELTA, layer_types=LINEAR_FULL,
        num_hidden_layers=8
    ),
    _family(
        _HYBRID, "Qwen 3 Next", "Qwen3-Next-80B-A3B", "qwen3_next", **DELTA, layer_types=LINEAR_FULL,
        num_hidden_layers=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    ),
    _family(
        _HYBRID, "Falcon H1", "Falcon-H1", "falcon_h1",
        head_dim=16, mamba_d_ssm=128, **MAMBA2,
    ),
    _family(
        _HYBRID, "Zamba 2", "Zamba2-1.2B", "zamba2",
        num_hidden_layers=9, layers_block_type=["mamba", "mamba", "hybrid"] * 3, mamba_d_state=8,
        n_mamba_heads=8, chunk_size=16, num_key_value_heads=4, attention_head_dim=32, num_mem_blocks=1,
        mamba_headdim=16,
    ),
    _family(
        _HYBRID, "Recurrent Gemma", "RecurrentGemma-2B", "recurrent_gemma",
        num_hidden_layers=9, lru_width=64, attention_window_size=32, max_position_embeddings=...,
    ),
    _family(
        _HYBRID, "Granite 4 hybrid", "Granite 4.0 H", "granitemoehybrid",
        layer_types=["mamba", "mamba", "attention"] * 2, num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=64, **MAMBA2,
    ),
    _family(
        _HYBRID, "LFM 2", "LFM2-1.2B", "lfm2",
        layer_types=["conv", "conv", "full_attention"] * 2, block_multiple_of=16,
    ),
    _family(
        _HYBRID, "Jamba", "Jamba 1.5", "jamba",
        num_experts=4, num_experts_per_tok=2, attn_layer_period=4, attn_layer_offset=2,
        num_hidden_layers=8, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8,
    ),
    _family(
        _HYBRID, "Nemotron H", "Nemotron-H-8B", "nemotron_h",
        layers_block_type=["mamba", "mlp", "attention", "mlp"] * 2, head_dim=16, ssm_state_size=8,
        mamba_num_heads=8, mamba_head_dim=16, n_groups=2, chunk_size=16, num_hidden_layers=...,
    ),
    _family(
        _HYBRID, "Bamba", "Bamba-9B", "bamba", attn_layer_indices=[2, 5], mamba_n_groups=1, **MAMBA2,
    ),
    _family("head sizes by layer", "Gemma 4", "Gemma 4 (text)", "gemma4_text",
            head_dim=16, global_head_dim=32, hidden_size_per_layer_input=16, vocab_size_per_layer_input=320,
            num_kv_shared_layers=0, layer_types=_TYPES, sliding_window=32),
    _family("sliding window", "Gemma 3", "Gemma 3 1B", "gemma3_text",
            head_dim=16, layer_types=_TYPES, sliding_window=32),
    _bare(_STATES, "Mamba", "Mamba-130m", "mamba", hidden_size=64, num_hidden_layers=6, state_size=8),
    _bare(
        _STATES, "Mamba 2", "Mamba2-130m, Codestral Mamba", "mamba2",
        hidden_size=64, num_hidden_layers=6, state_size=8, num_heads=8, head_dim=16, n_groups=2,
        chunk_size=16,
    ),
    _bare(
        _STATES, "Falcon Mamba", "Falcon-Mamba-7B", "falcon_mamba",
        hidden_size=64, num_hidden_layers=6, state_size=8,
    ),
    _bare(
        _STATES, "RWKV", "RWKV-4", "rwkv",
        hidden_size=64, attention_hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        context_length=512,
    ),
    _bare("no longest position", "BLOOM", "BLOOM, BLOOMZ", "bloom", hidden_size=64, n_layer=6, n_head=4),
    _bare(
        "no longest position", "MPT", "MPT-7B", "mpt", d_model=64, n_layers=6, n_heads=4, max_seq_len=512,
    ),
    _bare(
        "other names", "GPT-2", "GPT-2", "gpt2", attention="sdpa", n_embd=64, n_layer=6, n_head=4,
        n_positions=512,
    ),
    _vision(
        "Gemma 3 with vision", "Gemma 3 4B", "gemma3",
        {**SIZES, "model_type": "gemma3_text", "head_dim": 16, "layer_types": _TYPES, "sliding_window": 32},
        {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
         "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    ),
    _vision(
        "Qwen 2.5 VL", "Qwen2.5-VL-3B", "qwen2_5_vl",
        {**SIZES, "model_type": "qwen2_5_vl_text",
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
    ),
    _vision(
        "Qwen 3 VL", "Qwen3-VL-4B", "qwen3_vl",
        {**SIZES, "model_type": "qwen3_vl_text", "head_dim": 16,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
         "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
