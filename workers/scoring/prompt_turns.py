"""Split the tokens of a prompt into the turns that its chat template made of them, for display."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What chat templates call those who speak.
ROLES = ("system", "developer", "user", "human", "assistant", "model", "gpt", "bot", "tool", "ipython")
_ROLE = re.compile(rf"\s*({'|'.join(ROLES)})(\s*\n|\s*$)")


def turns_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Return (role, text) of each turn of a prompt; empty where the template does not mark roles.

    Roles stand between special tokens (`<|im_start|>user`, `<start_of_turn>model`), alone or before their
    text.  A turn without text, such as the beginning of the answer, is left out.
    """
    special = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    runs = [
        tokenizer.decode(list(run))
        for is_special, run in groupby(ids, key=lambda token: token in special)
        if not is_special
    ]
    turns: list[tuple[str, str]] = []
    for run in runs:
        found = _ROLE.match(run)
        if found:
            turns.append((found[1], run[found.end() :].strip()))
        elif turns and not turns[-1][1]:
            turns[-1] = (turns[-1][0], run.strip())
        elif run.strip():
            return []  # text that nobody says: not a template of this kind
    return [(role, text) for role, text in turns if text]
