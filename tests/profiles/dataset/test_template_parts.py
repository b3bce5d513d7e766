"""Templates of vision-language checkpoints: those that take content in parts, and where they are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft.profiles.dataset import describe, prepare
from autosft.profiles.dataset.template_parts import with_parts
from autosft.profiles.dataset.turn_end import turn_end
from autosft.workers.scoring.generation import prompt_tokens
from tests.profiles.dataset.prepared_data import Write, jsonl
from tests.profiles.dataset.reading import assistant, user
from tests.profiles.dataset.small_tokenizer import make_tokenizer

LOOPED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}"
    "{{ '' if m['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
SELECTED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {% for part in m.content | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ part.text }}{% endgeneration %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
DATED = "{{ strftime_now('%Y') }}" + LOOPED
EITHER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>")
TALKS = jsonl([{"messages": [user(f"question {n}"), assistant(f"answer {n}")]} for n in range(40)])


@pytest.mark.parametrize("template", [LOOPED, DATED, EITHER], ids=["looped", "dated", "either"])
@pytest.mark.parametrize("is_processors", [False, True])
def test_text_is_put_into_parts_where_a_template_takes_nothing_else(
    template: str, is_processors: bool, write: Write, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "model"
    make_tokenizer(chat_template=template, eos="<|im_end|>", special=SPECIAL).save_pretrained(folder)
    if is_processors:  # as older vision-language checkpoints have it, for their processor alone
        (folder / "chat_template.jinja").unlink()
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    prepared = prepare(write("a.jsonl", TALKS), model=str(folder), cache_dir=cache)

    (asked, is_asked_scored), (answer, is_answer_scored), *_ = prepared.samples[0]
    assert "<|im_start|>user: question" in asked
    assert answer.strip().startswith("answer")
    assert answer.endswith("<|im_end|>")
    assert (is_asked_scored, is_answer_scored) == (False, True)
    assert any("of its processor" in said for said in describe(prepared)) is is_processors


def test_models_are_asked_in_parts_too() -> None:
    tokenizer = make_tokenizer(chat_template=LOOPED, eos="<|im_end|>", special=SPECIAL)
    asked = tokenizer.decode(prompt_tokens([{"role": "user", "content": "hello"}], tokenizer))

    assert asked == "<|im_start|>user: hello<|im_end|>\n<|im_start|>assistant: "
    assert tokenizer.decode(turn_end(tokenizer).token_ids[0]) == "<|im_end|>"


def test_other_templates_stay_as_they_are() -> None:
    tokens = {"eos_token": "</s>"}

    assert with_parts(EITHER, tokens) == EITHER
    assert with_parts("{{ broken", tokens) == "{{ broken"
    assert with_parts(SELECTED, tokens) != SELECTED
