"""Compare a GGUF file in llama.cpp with the transformers folder that it was converted from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autosft.profiles.dataset.turn_end import turn_end
from autosft.workers.tools.gguf_engine import Asked, Said, ask
from autosft.workers.tools.gguf_texts import PLAIN, STRUCTURED, texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: How much log-probabilities may differ: root mean square over the likeliest tokens, as a share of the spread
#: of the logits.  ggml multiplies f16 and bf16 weights with inputs rounded to the same; q8_0 keeps 8 bits.
TOLERANCE = {"f32": 5e-3, "f16": 2e-2, "bf16": 5e-2, "q8_0": 1e-1}
NUM_LIKELIEST = 512
#: Lengths of the prompts after which the next token is compared.
_LENGTHS = (1, 7, 31, 96)
_BEYOND = 24  # tokens past a window or an original context
_LONGEST_ROW = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result: `differences` are reasons not to use the file, `notes` are remarks for the user."""

    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()
    num_texts: int = 0
    num_rows: int = 0
    apart: float = 0.0  # the largest distance of log-probabilities, as a share of the spread


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    file: Path,
    *,
    dtype: str,
    rows: Sequence[Sequence[int]],
    adapter: Path | None = None,
    chat_template: str | None = None,
) -> Comparison:
    """Compare token ids, next tokens' probabilities after `rows`, ends of turns, rendered conversations.

    `model` computes in fp32, with the weights that were converted; with `adapter`, the file of an adapter
    that llama.cpp applies, it is the adapted one.  `chat_template` takes the place of the file's.  Raises
    UserError where llama.cpp does not load the file.
    """
    sentences = texts(special_tokens(tokenizer))
    ends = turn_end(tokenizer, model.generation_config).token_ids
    conversations = conversations_for(tokenizer)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    said = ask(
        file,
        Asked(
            texts=sentences,
            rows=tuple(tuple(row) for row in rows),
            num_likeliest=min(NUM_LIKELIEST, vocab_size),
            ends=ends,
            conversations=tuple(conversations.values()),
            adapter=None if adapter is None else str(adapter),
            chat_template=chat_template,
        ),
    )
    apart = [
        distance(logits_after(model, row), found)
        for row, found in zip(rows, said.log_probabilities, strict=True)
    ]
    differences = [
        *unlike_tokens(tokenizer, sentences, said),
        *unlike_logits(rows, apart, dtype, said.row_refusals),
        *unlike_ends(tokenizer, ends, said),
    ]
    turns, notes = unlike_turns(tokenizer, conversations, said)
    return Comparison(
        differences=(*differences, *turns),
        notes=tuple(notes),
        num_texts=len(sentences),
        num_rows=len(rows),
        apart=max(apart, default=0.0),
    )


def special_tokens(tokenizer: Any) -> list[str]:
    """Return the added tokens, beginning with those in the chat template and named ones."""
    named = {str(token) for token in tokenizer.special_tokens_map.values()}
    template = str(tokenizer.chat_template or "")
    tokens = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return sorted(tokens, key=lambda token: (token not in template, token not in named))


def conversations_for(tokenizer: Any) -> Mapping[str, Mapping[str, Any]]:
    """Return the conversations that a chat template supports: with tools only if it renders them."""
    if not tokenizer.chat_template:
        return {}
    asked = STRUCTURED["tools"]
    try:
        lists_tools = _rendered(tokenizer, asked) != _rendered(tokenizer, {"messages": asked["messages"]})
    except Exception:  # templates raise anything
        lists_tools = True
    return {**PLAIN, **STRUCTURED} if lists_tools else PLAIN


def rows_of(config: Any, vocab_size: int) -> list[list[int]]:
    """Return prompts of token ids, always the same: short ones, and beyond a window or an original context.

    Those of more than `_LONGEST_ROW` tokens are left to a small twin of the model.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or max(_LENGTHS)
    lengths = [length for length in _LENGTHS if length <= longest]
    lengths += [turn + _BEYOND for turn in turning_points(text) if turn + _BEYOND <= _LONGEST_ROW]
    drawn = torch.Generator().manual_seed(0)
    row = torch.randint(vocab_size, (max(lengths),), generator=drawn).tolist()
    return [row[:length] for length in sorted(set(lengths))]


def turning_points(text: Any) -> list[int]:
    """Return the lengths at which a model computes otherwise: a window, a chunk, an original context."""
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(value, Mapping) for value in rope.values()) else [rope]
    found = [
        getattr(text, name, None)
        for name in ("sliding_window", "attention_chunk_size", "attention_window_size")
    ]
    for kind in kinds:
        found.append(kind.get("original_max_position_embeddings"))
        if kind.get("rope_type") == "dynamic":
            found.append(text.max_position_embeddings)
    return [int(value) for value in found if value]


# Each kind of difference


def unlike_tokens(tokenizer: Any, sentences: Sequence[str], said: Said) -> list[str]:
    unlike = [
        (text, ids, found)
        for text, ids, found in zip(
            sentences, tokenizer(list(sentences))["input_ids"], said.tokens, strict=True
        )
        if list(ids) != list(found)
    ]
    if not unlike:
        return []
    text, ids, found = min(unlike, key=lambda item: len(item[0]))
    return [
        f"{len(unlike)} of {len(sentences)} texts have other token ids, the shortest {text[:40]!r}: "
        f"{_few(found)} in llama.cpp, {_few(ids)} in transformers"
    ]


def logits_after(model: PreTrainedModel, row: Sequence[int]) -> torch.Tensor:
    """Return the logits (vocabulary) of the token that follows a prompt, in fp32."""
    ids = torch.tensor([list(row)])
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).logits
    return logits[0, -1].float()


def distance(logits: torch.Tensor, found: Mapping[int, float]) -> float:
    """Return how far log-probabilities are from a model's: root mean square over its logits' spread."""
    inside = [token for token in found if token < len(logits)]
    values = torch.tensor([math.nan if found[token] is None else found[token] for token in inside])
    wanted = torch.log_softmax(logits, dim=-1)[inside]
    spread = float((logits - logits.mean()).pow(2).mean().sqrt())
    if not inside or not bool(torch.isfinite(values).all()):
        return math.inf
    return float((values - wanted).pow(2).mean().sqrt()) / max(spread, 1e-9)


def unlike_logits(
    rows: Sequence[Sequence[int]], apart: Sequence[float], dtype: str, refusals: Sequence[str]
) -> list[str]:
    bound = TOLERANCE[dtype]
    unlike = [
        (len(row), value, refusal)
        for row, value, refusal in zip(rows, apart, refusals, strict=True)
        if not value <= bound
    ]
    if not unlike:
        return []
    length, value, refusal = unlike[0]
    if refusal:
        return [f"llama.cpp does not take a prompt of {length} tokens: {refusal}"]
    return [
        f"the next token's probabilities differ after {length} tokens: {value:.2g} of the logits' spread, "
        f"more than {bound:g} ({len(unlike)} of {len(rows)} prompts)"
    ]


def unlike_ends(tokenizer: Any, ends: Sequence[int], said: Said) -> list[str]:
    """The first of a turn's ends must end an answer: it is what the model has learned to say."""
    if not ends or said.ends[0]:
        return []
    return [f"llama.cpp goes on after {tokenizer.convert_ids_to_tokens(ends[0])!r}, which ends a turn"]


def unlike_turns(
    tokenizer: Any, conversations: Mapping[str, Mapping[str, Any]], said: Said
) -> tuple[list[str], list[str]]:
    """Return what makes conversations differ, and what to say of those that neither can render."""
    unlike: list[str] = []
    notes: list[str] = []
    rows = zip(conversations.items(), said.rendered, said.rendered_tokens, said.refusals, strict=True)
    for (name, conversation), text, ids, refusal in rows:
        try:
            wanted = _rendered(tokenizer, conversation)
        except Exception as error:
            notes.append(f"The chat template renders no {name}: {_first_line(error)}.")
            continue
        if text is None:
            unlike.append(f"llama.cpp does not render {name}: {refusal}")
            continue
        bos = tokenizer.bos_token or ""
        if wanted.removeprefix(bos) != text.removeprefix(bos):
            unlike.append(
                f"{name} is rendered otherwise: {_where(wanted.removeprefix(bos), text.removeprefix(bos))}"
            )
        elif list(tokenizer(wanted, add_special_tokens=False)["input_ids"]) != list(ids):
            wanted_ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
            unlike.append(
                f"{name} has other token ids: {_few(ids)} in llama.cpp, {_few(wanted_ids)} in transformers"
            )
    return unlike, notes


def _rendered(tokenizer: Any, conversation: Mapping[str, Any]) -> str:
    return str(
        tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation.get("tools"),
            add_generation_prompt=True,
            tokenize=False,
        )
    )


def _where(wanted: str, found: str) -> str:
    """Return the place where two texts part."""
    first = next(
        (i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b),
        min(len(wanted), len(found)),
    )
    start = max(0, first - 12)
    return f"{found[start : first + 28]!r} in llama.cpp, {wanted[start : first + 28]!r} in transformers"


def _few(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    return f"[{shown}{', …' if len(ids) > 8 else ''}]"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


__all__ = ["Comparison", "compare", "rows_of", "turning_points"]
