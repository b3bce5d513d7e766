"""Lets models answer instructions: greedy decoding, in batches.  Run it through `process.call`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

Message = Mapping[str, str]


def answer(
    model: str, conversations: Sequence[Sequence[Message]], *, max_new_tokens: int, batch_size: int = 64
) -> list[str]:
    """Return what the model in folder `model` says after each conversation (which ends with a user turn).

    Sequences of like length share a batch, padded on the left; the answers are in the order given.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(model).to(device).eval()
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    prompts = [
        tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True)
        for one in conversations
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        ids = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in ids],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
            return_token_type_ids=False,
        ).to(device)
        with torch.no_grad():
            output = network.generate(**batch, generation_config=greedy)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(ids, texts, strict=True):
            answers[i] = text.strip()
    return answers
