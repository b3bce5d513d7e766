"""A Modelfile's template writes plain turns as the chat template does, or it is left out and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from autosft.workers.tools.modelfile import modelfile, turns_of
from tests.workers.tools.tiny_tokenizers import CHATML, LLAMA2, byte_level_tokenizer

DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}"
    "{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NUMBERED = "{% for message in messages %}{{ loop.index }}. {{ message['content'] }}\n{% endfor %}"

#: Chat templates, and the beginning of what Ollama gets.
TEMPLATES = {
    "ChatML": (CHATML, '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'),
    "a system message by default": (
        DEFAULT_SYSTEM,
        "{{ if not .System }}<|im_start|>system\nYou are helpful.<|im_end|>\n{{ end }}{{ range .Messages }}",
    ),
    "Llama 2's": (
        LLAMA2,
        '<|endoftext|>{{ range .Messages }}{{ if eq .Role "system" }}[INST] {{ .Content }}',
    ),
    "no system message": (NO_SYSTEM, '{{ range .Messages }}{{ if eq .Role "user" }}<user>{{ .Content }}'),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return byte_level_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_turns_are_written_as_by_the_chat_template(
    name: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, start = TEMPLATES[name]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = turns_of(tokenizer)
    assert turns is not None
    assert turns.as_go().startswith(start)
    conversation = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    wanted = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert turns.render(conversation) == wanted


def test_a_first_token_that_opens_every_turn_is_part_of_them(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path)
    tokenizer.chat_template = DEFAULT_SYSTEM
    tokenizer.bos_token = "<|im_start|>"
    turns = turns_of(tokenizer)
    assert turns is not None
    assert turns.as_go().startswith(TEMPLATES["a system message by default"][1])


def test_unsupported_turns_are_left_out_with_a_note(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", NUMBERED)
    text, [note] = modelfile(tokenizer, None, "tuned.gguf")
    assert "TEMPLATE" not in text
    assert "no TEMPLATE" in note


def test_ends_of_turns_and_sampling_settings_are_written(tokenizer: Any) -> None:
    sampled = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, eos_token_id=[2, 0])
    text, notes = modelfile(tokenizer, sampled, "tuned.gguf")
    assert notes == []
    assert text.startswith("FROM ./tuned.gguf\nTEMPLATE ")
    assert text.endswith(
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\n'
        "PARAMETER temperature 0.7\nPARAMETER top_p 0.9\n"
    )
    greedy, _ = modelfile(tokenizer, GenerationConfig(do_sample=False), "tuned.gguf")
    assert greedy.endswith("PARAMETER temperature 0\n")
