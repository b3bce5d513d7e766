"""Determine where an assistant's turn ends, for generation and for a trained model's generation_config.json.

A tokenizer's end-of-sequence token often differs from what the chat template writes after an answer (Gemma's
`<end_of_turn>`, Phi-3's `<|end|>`, `<|im_end|>` of Qwen's base models), and a model that has learned the
latter never generates the former.  What the template writes is found by rendering it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autosft.profiles.dataset.template import chat_template
from autosft.profiles.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnd:
    """What ends a turn."""

    token_ids: tuple[int, ...]  # alternatives; the template's first, for engines that use only one
    text: str = ""  # what the template writes if that is not a single token

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The ids in the form of `GenerationConfig`."""
        if len(self.token_ids) > 1:
            return list(self.token_ids)
        return self.token_ids[0] if self.token_ids else None


def turn_end(tokenizer: Any, generation: GenerationConfig | None = None) -> TurnEnd:
    """Return what ends a turn: by the chat template, the tokenizer's end of sequence, `generation`'s list."""
    text = _end_in_template(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    known = [*_as_list(tokenizer.eos_token_id), *_as_list(getattr(generation, "eos_token_id", None))]
    if ids and (ids[0] in tokenizer.added_tokens_decoder or ids[0] in known):
        return TurnEnd(token_ids=tuple(dict.fromkeys([ids[0], *known])))
    if set(ids) & set(known):  # text followed by a token that ends generation anyway
        text = ""
    return TurnEnd(token_ids=tuple(dict.fromkeys(known)), text=text)


def set_turn_end(model: Any, tokenizer: Any) -> TurnEnd:
    """Make a model stop at the end of its turn and save that with `save_pretrained`; return the end of turn.

    generation_config.json holds only tokens: a text of several tokens has to be handled by the caller.
    """
    config = model.generation_config
    end = turn_end(tokenizer, config)
    if end.token_ids:
        config.eos_token_id = end.eos_token_id
    return end


def _end_in_template(tokenizer: Any) -> str:
    """Return what the chat template writes after an answer, "" without a template that can be rendered."""
    if not tokenizer.chat_template:
        return ""
    try:
        return chat_template(tokenizer, "the model").end_of_turn.strip()
    except UserError:  # reported where conversations are rendered
        return ""


def _as_list(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
