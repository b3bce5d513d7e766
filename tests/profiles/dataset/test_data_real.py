"""Preparing real files, where they are beside this checkout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from autosft.profiles.dataset import (
    DataFormat,
    Split,
    prepare,
)
from autosft.profiles.dataset.prepared import IGNORED
from tests.profiles.dataset.prepared_data import SHARED, needs_shared_data, rows


@pytest.mark.slow
@needs_shared_data
@pytest.mark.parametrize(
    ("name", "data_format", "num_examples", "model"),
    [
        ("alpaca_en_demo.json", DataFormat.ALPACA, 999, "plain_model"),
        ("glaive_toolcall_en_demo.json", DataFormat.SHAREGPT, 300, "plain_model"),
        ("glaive_toolcall_en_demo.json", DataFormat.SHAREGPT, 300, "chat_model"),
        ("wikitext2_valid.txt", DataFormat.TEXT, None, "plain_model"),
    ],
)
def test_real_files(
    name: str,
    data_format: DataFormat,
    num_examples: int | None,
    model: str,
    cache: Path,
    request: pytest.FixtureRequest,
) -> None:
    path = SHARED / "data" / name
    prepared = prepare(str(path), model=request.getfixturevalue(model), cache_dir=cache)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)

    assert prepared.format is data_format
    assert prepared.skipped == ()
    total = sum(prepared.counts(split).num_examples for split in Split)
    if num_examples is None:
        ids = [token for split in Split for block in rows(prepared, split)["input_ids"] for token in block]
        decoded = tokenizer.decode(ids)  # at once: a character of several tokens may stand in two blocks
        assert sorted(decoded.replace("</s>", "").replace("<|im_end|>", "").split()) == sorted(
            path.read_text(encoding="utf-8").split()
        )
        return
    # Content that is given twice is evaluated on once and not trained on.
    assert num_examples - total == prepared.num_duplicates_removed
    assert 0 <= num_examples - total < 10
    answers = _answers(json.loads(path.read_text(encoding="utf-8")))
    for split in Split:
        for row in rows(prepared, split):
            for run in _runs(row["input_ids"], row["labels"]):
                answer = tokenizer.decode(run)
                assert answer.endswith(tokenizer.eos_token)
                assert answer.removesuffix(tokenizer.eos_token).strip() in answers


def _answers(records: list[dict[str, Any]]) -> set[str]:
    """Every answer of the two real files, calls as both templates write them."""
    answers = set()
    for record in records:
        for turn in record.get("conversations", []):
            if turn["from"] == "gpt":
                answers.add(turn["value"].strip())
            if turn["from"] == "function_call":
                called = json.dumps(json.loads(turn["value"]), ensure_ascii=False)
                answers.add(f"<tool_call>\n{called}\n</tool_call>")
        if "output" in record:
            answers.add(record["output"].strip())
    return answers


def _runs(ids: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [run for run in runs if run]
