"""Rows padded to few sizes: never beyond the truncation length, with padding that nothing sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autosft.workers.data import collator
from tests.cli.chat_model import make_chat_model


def examples(*lengths: int) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": list(range(5, 5 + length)), "labels": [-100, *range(6, 5 + length)]}
        for length in lengths
    ]


@pytest.mark.parametrize(
    ("lengths", "seq_len", "expected"),
    [((10, 20), 256, 64), ((64,), 256, 64), ((65, 3), 256, 128), ((65, 3), 100, 100), ((300,), 100, 100)],
)
def test_rows_have_a_size_that_few_share(
    lengths: tuple[int, ...], seq_len: int, expected: int, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_chat_model(tmp_path))
    plain = collator(tokenizer, seq_len)(examples(*lengths))
    padded = collator(tokenizer, seq_len, in_few_sizes=True)(examples(*lengths))
    longest = min(max(lengths), seq_len)
    assert set(padded) == set(plain)
    for name, rows in padded.items():
        assert rows.shape == (len(lengths), expected)
        assert torch.equal(rows[:, :longest], plain[name])
    beyond = {name: rows[:, longest:] for name, rows in padded.items()}
    assert (beyond["input_ids"] == tokenizer.pad_token_id).all()
    assert (beyond["labels"] == -100).all()
    assert (beyond["attention_mask"] == 0).all()


def test_longer_rows_have_the_same_loss(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_chat_model(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    losses = [
        float(model(**collator(tokenizer, 128, in_few_sizes=padded)(examples(33, 20))).loss)
        for padded in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-6)
