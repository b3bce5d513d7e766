"""Greedy generation in batches that fit: by the size of the key-value cache, not by trying."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from autosft.profiles.model.model_class import attention_heads, depth_of, per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, str]

MAX_BATCH = 64  # beyond this a step of generation is bound by arithmetic, no longer by reading the weights


def bytes_per_sequence(config: Any, *, num_tokens: int, dtype_bytes: int) -> int:
    """Return the bytes that one more sequence takes in generation.

    Keys and values of every layer, twice since the cache is copied as it grows, and the logits of the
    prompt's last position in fp32 three times over (transformers' processors keep copies).  Sliding windows
    and states of constant size are counted as full caches: an upper bound.
    """
    text = config.get_text_config()
    _, heads, head_dim = attention_heads(text)  # none of a state-space model, whose state is small
    cache = 2 * (depth_of(config) or 0) * heads * head_dim * num_tokens * dtype_bytes
    # The prompt's forward pass: a layer's activations, widest in the MLP.
    intermediate = per_layer(text, "intermediate_size") or 4 * text.hidden_size
    width = 4 * text.hidden_size + 3 * intermediate
    return int(2 * cache + 3 * 4 * text.vocab_size + num_tokens * width * dtype_bytes)


def batch_that_fits(config: Any, *, free_bytes: int, num_tokens: int, dtype_bytes: int) -> int:
    """Return how many sequences of `num_tokens` tokens fit into `free_bytes`, from 1 to MAX_BATCH."""
    one = bytes_per_sequence(config, num_tokens=num_tokens, dtype_bytes=dtype_bytes)
    return max(1, min(MAX_BATCH, free_bytes // one))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int | Callable[[int], int],
    precision: AbstractContextManager[None] | None = None,
    on_batch: Callable[[], object] | None = None,
) -> list[str]:
    """Return what the model says after each conversation (which ends with a user turn), in their order.

    Prompts of like length share a batch, padded on the left; `batch_size` may be a function of the longest
    prompt's tokens.  The model's training flag is put back.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = [
        tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
        for one in conversations
    ]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the worst batch first
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        while order:
            longest = len(prompts[order[0]])
            size = batch_size if isinstance(batch_size, int) else batch_size(longest)
            ids, order = order[:size], order[size:]
            batch = _left_padded([prompts[i] for i in ids], tokenizer.pad_token_id)
            batch = {name: value.to(model.device) for name, value in batch.items()}
            with torch.no_grad(), precision or nullcontext():
                output = model.generate(**batch, generation_config=greedy)
            told = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            for i, text in zip(ids, told, strict=True):
                answers[i] = text.strip()
            if on_batch is not None:
                on_batch()
    finally:
        model.train(was_training)
    return answers


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
