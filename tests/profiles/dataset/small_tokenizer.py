"""Small byte-level BPE tokenizers with real chat templates, made on the spot."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("chat_templates.json").read_text(encoding="utf-8")
)
_CORPUS = [
    "You are a helpful assistant. Write a short poem about the rain in Paris.",
    "The answer is four, because two plus two is four. What is the weather like today?",
    "Assistant and user take turns; the system speaks first. Thanks, that was helpful!",
]


def template_text(facts: dict[str, Any]) -> str | None:
    """The chat template's text: in the facts, or in the installed trl by its name there."""
    if "trl" in facts:
        return files("trl").joinpath("chat_templates", f"{facts['trl']}.jinja").read_text(encoding="utf-8")
    return facts["template"]  # type: ignore[no-any-return]


def training_template_text(name: str) -> str:
    """trl's variant of one of its templates, with {% generation %} marks set by hand."""
    path = files("trl").joinpath("chat_templates", f"{name}_training.jinja")
    return path.read_text(encoding="utf-8")


@cache
def _backend(special: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 10, trainer)
    return tokenizer.to_str()


def make_tokenizer(
    *,
    chat_template: str | None = None,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    special: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    tokens = tuple(dict.fromkeys(token for token in (bos, eos, *special) if token is not None))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(tokens)),
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=list(special),
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tokenizer_for(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    return make_tokenizer(
        chat_template=template_text(facts),
        bos=facts["bos"],
        eos=facts["eos"],
        special=tuple(facts["special"]),
    )


@cache
def llama_like_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Like Llama 2's: spaces as "▁", one put before every text, bytes for unknown letters, <s> added."""
    facts = facts_of(name)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *facts["special"], *bytes_],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 5, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=facts["special"],
    )
    fast.chat_template = template_text(facts)
    return fast


def facts_of(name: str) -> dict[str, Any]:
    return next(facts for facts in TEMPLATES if facts["name"] == name)
