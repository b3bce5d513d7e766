"""A model shaped like SmolLM2 and shrunk, with a tokenizer that has a ChatML template, and chats for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+m['content']+'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def byte_level_bpe(texts: Sequence[str], special_tokens: Sequence[str]) -> Any:
    """Train a byte-level BPE tokenizer of up to 600 entries on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_chat_model(folder: Path, texts: Sequence[str] = ("One two three four yes no.",)) -> Path:
    """Write a model: SmolLM2's 9 heads, 3 key-value heads and tied embeddings, 2 layers of width 36."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = byte_level_bpe(texts, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=36,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_chats(path: Path, chats: Sequence[dict[str, Any]] | None = None) -> Path:
    """Write conversations as JSON lines; of one to three rounds where none are given."""
    made = chats or [
        {
            "messages": [
                turn
                for item in range(1 + n % 3)
                for turn in (
                    {"role": "user", "content": f"say {n} {item}"},
                    {"role": "assistant", "content": f"yes {n} {item}"},
                )
            ]
        }
        for n in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, made)) + "\n", encoding="utf-8")
    return path
