"""Where a turn ends: by the template, the tokenizer and the model's own list, for every kind of template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from transformers import GenerationConfig

from autosft.profiles.dataset.turn_end import turn_end
from tests.profiles.dataset.small_tokenizer import facts_of, make_tokenizer, tokenizer_for

REAL = {
    "ChatML": ["<|im_end|>"],
    "Llama 2": ["</s>"],
    "Zephyr": ["</s>"],
    "Gemma": ["<end_of_turn>", "<eos>"],
    "Gemma 3": ["<end_of_turn>", "<eos>"],
    "Llama 3": ["<|eot_id|>", "<|end_of_text|>"],
    "Llama 3.1": ["<|eot_id|>"],
    "Qwen 2.5": ["<|im_end|>"],
    "Phi-3": ["<|end|>", "<|endoftext|>"],
    "DeepSeek V3": ["<｜end▁of▁sentence｜>"],
}


@pytest.mark.parametrize("name", REAL)
def test_real_templates(name: str) -> None:
    tokenizer = tokenizer_for(facts_of(name))
    found = turn_end(tokenizer)
    assert [tokenizer.convert_ids_to_tokens(identifier) for identifier in found.token_ids] == REAL[name]
    assert found.text == ""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    after: str  # what the template writes after an answer
    eos: str | None = "</s>"
    listed: tuple[str, ...] = ()  # in generation_config
    ends: tuple[str, ...]
    text: str = ""


CASES = (
    Case(
        name="a base model of Qwen's",
        after="<|im_end|>\n",
        eos="<|endoftext|>",
        ends=("<|im_end|>", "<|endoftext|>"),
    ),
    Case(
        name="more in generation_config",
        after="<|im_end|>",
        listed=("<|endoftext|>", "</s>"),
        ends=("<|im_end|>", "</s>", "<|endoftext|>"),
    ),
    Case(name="no end of sequence", after="<|im_end|>", eos=None, ends=("<|im_end|>",)),
    Case(name="a space before", after=" </s>", ends=("</s>",)),
    Case(name="text", after="\n### End\n", ends=("</s>",), text="### End"),
    Case(name="text before the end of sequence", after="\n[/ASSISTANT]</s>", ends=("</s>",)),
    Case(name="nothing", after="\n", ends=("</s>",)),
    Case(name="text alone", after="[END]", eos=None, ends=(), text="[END]"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ends_of_turns(case: Case) -> None:
    tokenizer = tokenizer_ending(case.after, eos=case.eos)
    ids = tokenizer.convert_tokens_to_ids(list(case.listed))
    found = turn_end(tokenizer, GenerationConfig(eos_token_id=ids or None))
    assert tuple(tokenizer.convert_ids_to_tokens(list(found.token_ids))) == case.ends
    assert found.text == case.text


def test_without_a_template_the_end_of_sequence_ends() -> None:
    tokenizer = make_tokenizer(chat_template=None)
    assert turn_end(tokenizer).token_ids == (tokenizer.eos_token_id,)


def tokenizer_ending(after: str, *, eos: str | None) -> Any:
    template = (
        "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}"
        f"{{{{ {after!r} if m.role == 'assistant' else '\\n' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    )
    return make_tokenizer(chat_template=template, eos=eos, special=("<|im_end|>", "<|endoftext|>", "</s>"))
