"""A model that is not there: a billion parameters, 512 positions."""

from __future__ import annotations

from autosft.profiles.model.profile import ModelProfile

MODEL = ModelProfile(
    source="models/small",
    revision=None,
    fingerprint="m" * 64,
    architecture="LlamaForCausalLM",
    config_json="{}",
    num_parameters=10**9,
    num_trainable=10**9,
    hidden_size=2048,
    num_layers=16,
    vocab_size=32000,
    max_positions=512,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=64,
    has_tied_embeddings=False,
    linear_groups=(),
    dtype="bfloat16",
    has_weights=True,
    has_tokenizer=True,
    has_chat_template=True,
    trust_remote_code=False,
    note=None,
)
