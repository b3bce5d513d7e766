"""Lengths: what a truncation length cuts, which one is chosen, and the fingerprint of what is evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from autosft.profiles.dataset import (
    Split,
    choose_seq_len,
    describe,
    eval_fingerprint,
    length_profile,
    prepare,
    truncation_report,
)
from autosft.profiles.dataset.prepared import IGNORED
from tests.profiles.dataset.prepared_data import Write, alpaca, jsonl, rows


def test_examples_are_cut_only_at_the_longest_position(write: Write, chat_model: str, cache: Path) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(50)]))
    whole = prepare(data, model=chat_model, cache_dir=cache)
    capped = prepare(data, model=chat_model, cache_dir=cache, max_positions=whole.train.longest - 1)

    assert capped.train.longest == whole.train.longest - 1
    assert capped.num_capped > 0
    assert f"cut at the model's longest position: {capped.num_capped}" in describe(capped)


def test_lengths_and_truncation_against_counting(write: Write, chat_model: str, cache: Path) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(80)]))
    prepared = prepare(data, model=chat_model, cache_dir=cache)
    dataset = rows(prepared, Split.TRAIN)
    shortest = min(dataset["first_label"])

    for seq_len in (1, shortest, shortest + 1, prepared.train.median_length, prepared.train.longest):
        profile = length_profile(prepared, seq_len)
        labels = [labels[:seq_len] for labels in dataset["labels"]]
        assert profile.lengths == tuple(map(len, labels))
        assert profile.scored == tuple(sum(label != IGNORED for label in row) for row in labels)
        (cut,) = truncation_report(prepared, [seq_len])
        assert cut.truncated_share == pytest.approx(np.mean(np.array(dataset["length"]) > seq_len))
        assert cut.lost_scored_share == pytest.approx(1 - sum(profile.scored) / prepared.train.num_scored)
        assert cut.num_unscored == sum(scored == 0 for scored in profile.scored)
    assert length_profile(prepared, 10_000, Split.EVAL).longest == prepared.eval.longest


@pytest.mark.parametrize(
    ("model_max", "expected", "reason"),
    [
        (2048, 128, "128 cuts 0.0% of the examples; 64 would cut 1.8%"),
        (100, 100, "100 cuts 0.0% of the examples; 64 would cut 1.8%"),
        (40, 40, "40 is the model's longest and cuts"),
    ],
)
def test_default_length_cuts_at_most_one_in_a_hundred(
    write: Write, plain_model: str, cache: Path, model_max: int, expected: int, reason: str
) -> None:
    """Of 170 examples to train on some 2 % are 90 tokens long, the others 50."""
    records = [{"prompt": f"{n:03d}", "completion": "#" * (86 if n % 50 == 0 else 46)} for n in range(200)]
    prepared = prepare(write("a.jsonl", jsonl(records)), model=plain_model, cache_dir=cache)

    chosen = choose_seq_len(prepared, model_max)

    assert (chosen.seq_len, chosen.reason[: len(reason)]) == (expected, reason)


def test_fingerprint_is_of_the_tokens_that_count() -> None:
    base = {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[IGNORED, 2, 3], [IGNORED, 5]]}
    changed = {
        "label": {**base, "labels": [[IGNORED, 2, 3], [4, 5]]},
        "token": {**base, "input_ids": [[1, 2, 3], [9, 5]]},
        "order": {name: values[::-1] for name, values in base.items()},
        "boundary": {name: [values[0] + values[1][:1], values[1][1:]] for name, values in base.items()},
    }
    same = {**base, "more": [0, 0]}

    whole = eval_fingerprint(Dataset.from_dict(base), 3)

    assert eval_fingerprint(Dataset.from_dict(same), 100) == whole
    assert eval_fingerprint(Dataset.from_dict(base).select([0, 1]), 3) == whole
    assert len({whole, *(eval_fingerprint(Dataset.from_dict(each), 3) for each in changed.values())}) == 5
    one, two = {"input_ids": [[1, 1]], "labels": [[1, 1]]}, {"input_ids": [[1], [1]], "labels": [[1], [1]]}
    assert eval_fingerprint(Dataset.from_dict(one), 3) != eval_fingerprint(Dataset.from_dict(two), 3)
    beyond = {**base, "input_ids": [[1, 2, 7], [4, 5]], "labels": [[IGNORED, 2, 7], [IGNORED, 5]]}
    assert (
        eval_fingerprint(Dataset.from_dict(beyond), 2)
        == eval_fingerprint(Dataset.from_dict(base), 2)
        != whole
    )
