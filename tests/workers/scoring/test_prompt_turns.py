"""What a prompt says, turn by turn, from its tokens alone."""

from __future__ import annotations

import pytest

from autosft.workers.scoring.prompt_turns import turns_of
from tests.profiles.dataset.small_tokenizer import facts_of, make_tokenizer, tokenizer_for

ASKED = [
    {"role": "user", "content": "Name a river.\nuser of boats"},
    {"role": "assistant", "content": "The Seine."},
    {"role": "user", "content": "Another?"},
]
SAID = [("user", "Name a river.\nuser of boats"), ("assistant", "The Seine."), ("user", "Another?")]


@pytest.mark.parametrize("name", ["ChatML", "Qwen 3", "Llama 3", "Gemma 3"])
def test_templates_that_mark_roles_are_split_into_turns(name: str) -> None:
    tokenizer = tokenizer_for(facts_of(name))
    ids = tokenizer.apply_chat_template(ASKED, tokenize=True, add_generation_prompt=True, return_dict=False)
    turns = [turn for turn in turns_of(ids, tokenizer) if turn[0] != "system"]
    assert turns == [
        ("model" if role == "assistant" and name == "Gemma 3" else role, text) for role, text in SAID
    ]


def test_text_without_roles_is_not_split() -> None:
    tokenizer = make_tokenizer()
    assert turns_of(tokenizer("<s>The user is a person.</s> And more.")["input_ids"], tokenizer) == []
    assert turns_of([], tokenizer) == []
