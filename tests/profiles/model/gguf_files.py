"""Writes tiny GGUF files, as llama.cpp's converter lays them out, with the weights that are in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<pad>"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE with GPT-2's words and a few merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        ["What is two plus two? It is four. 12 and 34"] * 3,
        trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


def make_gguf(
    path: Path,
    *,
    is_tied: bool = True,
    quantization: str = "Q8_0",
    pre: str = "gpt-2",
    extra: dict[str, tuple[int, ...]] | None = None,
    scaling: str | None = None,
) -> tuple[dict[str, torch.Tensor], Tokenizer]:
    """Write a two-layer Llama; return its dequantized weights by transformers' names, and its tokenizer."""
    tokenizer = make_tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=is_tied,
    )
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocab_size)
    if scaling is not None:
        writer.add_string("llama.rope.scaling.type", scaling)
    _add_tokenizer(writer, tokenizer, pre)
    kind = gguf.GGMLQuantizationType[quantization]
    plain: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue
        stored = (
            _permuted(weight, 4 if "q_proj" in name else 2)
            if "q_proj" in name or "k_proj" in name
            else weight
        )
        if weight.dim() == 1:
            writer.add_tensor(_gguf_name(name), weight.numpy())
            plain[name] = weight
            continue
        packed = gguf.quants.quantize(stored.numpy(), kind)
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=kind)
        values = torch.from_numpy(gguf.quants.dequantize(packed, kind).astype(np.float32))
        is_rotary = "q_proj" in name or "k_proj" in name
        plain[name] = _permuted_back(values, 4 if "q_proj" in name else 2) if is_rotary else values
    for name, shape in (extra or {}).items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if is_tied:
        plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
    return plain, tokenizer


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, pre: str) -> None:
    import json

    state = json.loads(tokenizer.to_str())
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(item) for item in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _gguf_name(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    if name == "lm_head.weight":
        return "output.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Lay the rows of a head out as llama.cpp's rotary positions want them."""
    rows = weight.shape[0] // heads // 2
    return weight.view(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()


def _permuted_back(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows = weight.shape[0] // heads // 2
    return weight.view(heads, rows, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape).contiguous()
