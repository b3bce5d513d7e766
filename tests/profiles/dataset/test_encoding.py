"""Long texts have the tokens that they would have in one piece."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from autosft.profiles.dataset.encoding import encode
from tests.profiles.dataset.small_tokenizer import facts_of, llama_like_tokenizer, tokenizer_for

WORDS = [
    "the",
    "answer",
    "is",
    "four,",
    "What's",
    "ÜBER",
    "日本語",
    "🙂",
    "x=1;\n\t",
    "",
    "def",
    "f(a):",
    "<|im_end|>",
]


def text_of(num_words: int, seed: int) -> str:
    words = random.Random(seed)
    return " ".join(words.choice(WORDS) for _ in range(num_words))


@pytest.mark.parametrize(
    "tokenizer",
    [tokenizer_for(facts_of("Qwen 2.5")), llama_like_tokenizer("Llama 2")],
    ids=["bytes", "llama"],
)
@pytest.mark.parametrize(
    "text",
    [text_of(900, 1), text_of(900, 2), "a" * 5000, "ab " * 2000, "\n" * 3000 + "x " * 900, "日" * 3000],
    ids=["words", "other words", "one letter", "pairs", "lines", "Japanese"],
)
def test_windows_are_joined_without_a_seam(tokenizer: Any, text: str) -> None:
    (whole,) = encode(tokenizer, [text])
    (joined,) = encode(tokenizer, [text], window=1000, overlap=200)

    assert len(text) > 1000
    for name in ("ids", "starts", "ends"):
        assert np.array_equal(getattr(whole, name), getattr(joined, name)), name


def test_no_window_is_longer_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from autosft.profiles.dataset import encoding

    tokenizer, given = tokenizer_for(facts_of("Qwen 2.5")), []
    tokenize = encoding._encode

    def noted(tokenizer: Any, texts: Sequence[str]) -> Sequence[Any]:
        given.extend(map(len, texts))
        return tokenize(tokenizer, texts)

    monkeypatch.setattr(encoding, "_encode", noted)
    list(encode(tokenizer, [text_of(900, 5)], window=1000, overlap=200))

    assert len(given) > 3
    assert max(given) == 1000


def test_texts_keep_their_order_whatever_their_lengths() -> None:
    tokenizer = tokenizer_for(facts_of("Qwen 2.5"))
    texts = ["one", text_of(300, 3), "two", text_of(300, 4), "three"]
    encoded = list(encode(tokenizer, texts, window=500, overlap=100))

    assert [tokenizer.decode(each.ids) for each in encoded] == texts
