"""Generate greedily in batches that fit in memory, computed from the size of the key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from autosft.profiles.dataset.template_bounds import bounded_template
from autosft.profiles.dataset.template_date import recorded_date, with_date
from autosft.profiles.dataset.template_parts import with_parts
from autosft.profiles.dataset.tokenizer import fit_pad
from autosft.profiles.dataset.turn_end import TurnEnd, turn_end
from autosft.profiles.model.model_class import attention_heads, depth_of, per_layer, width_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = Mapping[str, str]

MAX_BATCH = 64  # beyond this a decoding step is bound by arithmetic instead of reading the weights


def bytes_per_sequence(config: Any, *, num_tokens: int, dtype_bytes: int) -> int:
    """Return the bytes that each sequence adds to generation.

    Keys and values of every layer, twice since the cache is copied as it grows, and the logits of the
    prompt's last position in fp32 three times over (transformers' processors keep copies).  Sliding windows
    and states of constant size are counted as full caches: an upper bound.
    """
    text = config.get_text_config()
    _, heads, head_dim = attention_heads(text)  # none of a state-space model, whose state is small
    cache = 2 * (depth_of(config) or 0) * heads * head_dim * num_tokens * dtype_bytes
    # The prompt's forward pass: a layer's activations, widest in the MLP.
    hidden = width_of(text)
    width = 4 * hidden + 3 * (per_layer(text, "intermediate_size") or 4 * hidden)
    return int(2 * cache + 3 * 4 * per_layer(text, "vocab_size") + num_tokens * width * dtype_bytes)


def batch_that_fits(config: Any, *, free_bytes: int, num_tokens: int, dtype_bytes: int) -> int:
    """Return how many sequences of `num_tokens` tokens fit into `free_bytes`, from 1 to MAX_BATCH."""
    sequence_bytes = bytes_per_sequence(config, num_tokens=num_tokens, dtype_bytes=dtype_bytes)
    return max(1, min(MAX_BATCH, free_bytes // sequence_bytes))


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
    """Return the model's answer to each conversation (which ends with a user turn), in the same order.

    Options are those of `generate_after`.
    """
    return generate_after(
        model,
        tokenizer,
        [prompt_tokens(conversation, tokenizer) for conversation in conversations],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        precision=precision,
        on_batch=on_batch,
    )


def prompt_tokens(
    conversation: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    *,
    date: str | None = None,
) -> list[int]:
    """Return a conversation as prompt tokens, by the tokenizer's chat template or else by `template`.

    A template that contains today's date uses `date`, or the date that the model was trained with.
    """
    jinja = tokenizer.get_chat_template() if tokenizer.chat_template else template
    written = jinja and with_date(
        with_parts(jinja, tokenizer.special_tokens_map), date or recorded_date(tokenizer)
    )
    with bounded_template():
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, chat_template=written
        )
    return list(tokenizer(text, add_special_tokens=False, return_token_type_ids=False)["input_ids"])


def generate_after(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int | Callable[[int], int],
    precision: AbstractContextManager[None] | None = None,
    on_batch: Callable[[], object] | None = None,
    on_token: Callable[[], object] | None = None,
) -> list[str]:
    """Return the model's answer to each prompt, up to the end of its turn, in the order of the prompts.

    Prompts of similar length share a batch, padded on the left; `batch_size` may be a function of the longest
    prompt's number of tokens.  The model's training mode is restored.  `on_token` is called after each token
    of a batch.
    """

    def tell(ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
        assert on_token is not None
        on_token()
        return torch.zeros(len(ids), device=ids.device, dtype=torch.bool)  # nothing ends by it

    fit_pad(tokenizer, model.get_input_embeddings().num_embeddings)
    end = turn_end(tokenizer, model.generation_config)
    greedy = greedily(model, tokenizer, end, max_new_tokens=max_new_tokens)
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
                output = model.generate(
                    **batch,
                    generation_config=greedy,
                    tokenizer=tokenizer,
                    stopping_criteria=None if on_token is None else [tell],
                )
            for i, told in zip(ids, output[:, longest:].tolist(), strict=True):
                answers[i] = _text_of_turn(tokenizer, told, end)
            if on_batch is not None:
                on_batch()
    finally:
        model.train(was_training)
    return answers


def greedily(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: TurnEnd, *, max_new_tokens: int
) -> GenerationConfig:
    """Return how answers are decoded.

    Without a cache if the configuration has no `num_hidden_layers`, by which transformers makes one: custom
    code may call it otherwise.
    """
    has_depth = getattr(model.config.get_text_config(), "num_hidden_layers", None) is not None
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=has_depth,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end.eos_token_id,
        stop_strings=[end.text] if end.text else None,
    )


def stream_after(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    say: Callable[[str], object],
    is_stopped: Callable[[], bool],
) -> str:
    """Say what the model goes on with, piece by piece, and return all of it.

    It ends with the turn, or after the token at which `is_stopped` turns true.
    """
    fit_pad(tokenizer, model.get_input_embeddings().num_embeddings)
    end = turn_end(tokenizer, model.generation_config)
    told: list[int] = []
    said = ""

    def tell(_ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
        nonlocal said
        told.append(int(_ids[0, -1]))
        text = _text_of_turn(tokenizer, told, end)
        # A piece of a character is not said, nor what the end of the turn may begin with.
        if not text.endswith("\ufffd") and text.startswith(said) and not _may_end(text, end.text):
            say(text[len(said) :])
            said = text
        return torch.full((1,), is_stopped(), device=_ids.device, dtype=torch.bool)

    batch = {name: value.to(model.device) for name, value in _left_padded([prompt], 0).items()}
    with torch.no_grad():
        model.generate(
            **batch,
            generation_config=greedily(model, tokenizer, end, max_new_tokens=max_new_tokens),
            tokenizer=tokenizer,
            stopping_criteria=[tell],
        )
    whole = _text_of_turn(tokenizer, told, end)
    if whole.startswith(said):
        say(whole[len(said) :])
    return whole


def _may_end(text: str, end: str) -> bool:
    """Whether a text ends with a beginning of `end`."""
    return any(text.endswith(end[:length]) for length in range(1, len(end)))


def _text_of_turn(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], end: TurnEnd) -> str:
    """Return the text of generated tokens before the end of the turn."""
    length = next((at for at, id_ in enumerate(ids) if id_ in end.token_ids), len(ids))
    text: str = tokenizer.decode(ids[:length], skip_special_tokens=True)
    return (text.partition(end.text)[0] if end.text else text).strip()


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
