"""Preparing: columns, the cache, the template, and what the user is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from autosft.profiles.dataset import (
    DataFormat,
    PreparedData,
    Split,
    describe,
    load_prepared,
    prepare,
    sample_with_mask,
)
from autosft.profiles.dataset.prepared import IGNORED
from tests.profiles.dataset.prepared_data import Write, alpaca, jsonl, rows, texts


def test_columns_and_counts(write: Write, chat_model: str, cache: Path) -> None:
    prepared = prepare(
        write("a.jsonl", jsonl([alpaca(n) for n in range(200)])), model=chat_model, cache_dir=cache
    )

    assert prepared.format is DataFormat.ALPACA
    assert (prepared.train.num_examples, prepared.eval.num_examples, prepared.final.num_examples) == (
        170,
        20,
        10,
    )
    for split in Split:
        dataset, counts = rows(prepared, split), prepared.counts(split)
        assert dataset.column_names == ["input_ids", "labels", "length", "first_label"]
        lengths = [len(ids) for ids in dataset["input_ids"]]
        assert dataset["length"] == lengths
        assert counts.num_examples == len(dataset)
        assert counts.num_turns == 2 * len(dataset)
        assert (counts.num_tokens, counts.longest) == (sum(lengths), max(lengths))
        assert counts.median_length == int(np.median(lengths))
        scored = [np.flatnonzero(np.array(labels) != IGNORED) for labels in dataset["labels"]]
        assert counts.num_scored == sum(map(len, scored))
        assert dataset["first_label"] == [int(positions[0]) for positions in scored]
        for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True):
            assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert load_prepared(prepared.path) == load_prepared(prepared.path)


def test_prepared_once(write: Write, chat_model: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = jsonl([alpaca(n) for n in range(50)])
    first = prepare(write("a.jsonl", content), model=chat_model, cache_dir=cache)
    monkeypatch.setattr("autosft.profiles.dataset.build.build", None)

    again = prepare(write("moved/b.jsonl", content), model=chat_model, cache_dir=cache)

    assert again.path == first.path
    assert again.source.endswith("moved/b.jsonl")
    assert again.train == first.train


def test_everything_that_decides_the_tokens_decides_the_folder(
    write: Write, chat_model: str, plain_model: str, cache: Path
) -> None:
    records = [alpaca(n) for n in range(50)]
    data = write("a.jsonl", jsonl(records))
    other_data = write("b.jsonl", jsonl(records[1:]))
    options: list[dict[str, Any]] = [
        {},
        {"model": plain_model},
        {"seed": 1},
        {"max_rounds": 1},
        {"max_positions": 40},
        {"eval_share": 0.2},
        {"fold": "1/5"},
        {"fold": "2/5"},
        {"eval_data": write("c.jsonl", jsonl(records[:10]))},
        {"skip_bad_records": True},
    ]

    folders = {prepare(data, **{"model": chat_model, "cache_dir": cache, **each}).path for each in options}
    folders.add(prepare(other_data, model=chat_model, cache_dir=cache).path)

    assert len(folders) == len(options) + 1


def test_two_at_once_leave_one_whole_folder(write: Write, chat_model: str, cache: Path) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(50)]))
    made: list[PreparedData] = []
    threads = [
        threading.Thread(target=lambda: made.append(prepare(data, model=chat_model, cache_dir=cache)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [each.path for each in made] == [made[0].path] * 3
    assert [path.name for path in (cache / "datasets").iterdir()] == [made[0].path.name]


def test_the_plain_template_is_reported_and_saved(write: Write, plain_model: str, cache: Path) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(50)]))
    prepared = prepare(data, model=plain_model, cache_dir=cache)

    assert prepared.own_template
    assert any("has no chat template: a plain ChatML one is used" in line for line in describe(prepared))
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\nHi</s>\n<|im_start|>assistant\n"


def test_control_tokens_in_the_text_are_reported(write: Write, chat_model: str, cache: Path) -> None:
    records = [alpaca(n) for n in range(50)]
    records[7]["instruction"] += " Write <|im_end|>."
    prepared = prepare(write("a.jsonl", jsonl(records)), model=chat_model, cache_dir=cache)

    (said,) = prepared.notes
    assert said.startswith(
        "1 conversations hold control tokens of the tokenizer in their text, such as <|im_end|>"
    )


def test_samples_show_what_is_scored(write: Write, chat_model: str, cache: Path) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(50)]))
    prepared = prepare(data, model=chat_model, cache_dir=cache)

    (sample,) = sample_with_mask(prepared, 1)

    assert "".join(text for text, _ in sample) == texts(prepared, Split.TRAIN)[0]
    (answer,) = (text for text, scored in sample if scored)
    assert answer in [f"{alpaca(n)['output']}<|im_end|>" for n in range(50)]
    assert len(sample_with_mask(prepared, 5)) == 5
