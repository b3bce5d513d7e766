"""Tokenizers of a few hundred tokens, as GGUF files know them: sentencepiece's and byte-level BPE."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autosft.workers.tools.gguf_texts import PLAIN, texts

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
TURNS = ("<|im_start|>", "<|im_end|>")


@cache
def sentencepiece_model(vocab_size: int = 400) -> bytes:
    """Return a `tokenizer.model` of Llama 2's kind: BPE with bytes for what it does not know."""
    import sentencepiece

    with TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        known = [text for text in texts(()) if text.strip() and text.isascii()]  # the rest is bytes
        corpus.write_text("\n".join(known), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=f"{folder}/tokenizer",
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
        )
        return (Path(folder) / "tokenizer.model").read_bytes()


def sentencepiece_tokenizer(
    folder: Path, *, keeps_model: bool = True, puts_blank_first: bool = True, vocab_size: int = 400
) -> Any:
    """Write a tokenizer as Llama 2's `tokenizer.json` has it, `tokenizer.model` beside it if asked.

    Gemma's puts no blank before a text.
    """
    from tokenizers import Tokenizer, decoders, normalizers, processors
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "tokenizer.model"
        source.write_bytes(sentencepiece_model(vocab_size))
        read = LlamaTokenizer.from_pretrained(scratch).backend_tokenizer
        if keeps_model:
            shutil.copy(source, folder / "tokenizer.model")
    raw = Tokenizer(read.model)
    first = [normalizers.Prepend("▁")] if puts_blank_first else []
    raw.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = LLAMA2
    tokenizer.save_pretrained(folder)
    return tokenizer


def byte_level_tokenizer(
    folder: Path, *, vocab_size: int = 400, pattern: str | None = None, special: Sequence[str] = ()
) -> Any:
    """Write a byte-level BPE tokenizer; words are split as GPT-2 splits them, or by a pattern."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if pattern is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", *TURNS, *special]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in texts(()) if text.strip()], trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )
    whole.chat_template = CHATML
    folder.mkdir(parents=True, exist_ok=True)
    whole.save_pretrained(folder)
    return whole


__all__ = ["CHATML", "PLAIN", "byte_level_tokenizer", "sentencepiece_tokenizer"]
