"""Splits: what is evaluated on is in no training data, whatever the order of the records."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autosft.profiles.dataset import (
    Split,
    describe,
    eval_fingerprint,
    prepare,
)
from autosft.profiles.dataset.formats import Completion
from autosft.profiles.dataset.split import Fold, parse_fold, split_examples
from autosft.profiles.errors import UserError
from tests.profiles.dataset.prepared_data import Write, alpaca, jsonl, rows, texts


def test_no_content_is_in_two_splits_and_duplicates_leave_training(
    write: Write, chat_model: str, cache: Path
) -> None:
    records = [alpaca(n) for n in range(60)] * 2
    prepared = prepare(write("a.jsonl", jsonl(records)), model=chat_model, cache_dir=cache)

    train, held_out = texts(prepared, Split.TRAIN), texts(prepared, Split.EVAL) + texts(prepared, Split.FINAL)
    assert len(set(held_out)) == len(held_out) == 16
    assert not set(train) & set(held_out)
    assert len(train) == 120 - 2 * 16
    assert prepared.num_duplicates_removed == 16
    assert "left out of training, also evaluated on: 16" in describe(prepared)


def test_order_of_records_does_not_change_what_is_evaluated(
    write: Write, chat_model: str, cache: Path
) -> None:
    records = [alpaca(n) for n in range(100)]
    one = prepare(write("a.jsonl", jsonl(records)), model=chat_model, cache_dir=cache)
    random.Random(1).shuffle(records)
    other = prepare(write("b.json", json.dumps(records)), model=chat_model, cache_dir=cache)
    seeded = prepare(write("b.json", json.dumps(records)), model=chat_model, cache_dir=cache, seed=1)

    assert one.path != other.path
    for split in (Split.EVAL, Split.FINAL):
        assert texts(one, split) == texts(other, split)
        assert texts(one, split) != texts(seeded, split)
    fingerprints = {eval_fingerprint(rows(each, Split.EVAL), 64) for each in (one, other)}
    assert len(fingerprints) == 1


def test_given_evaluation_data_is_taken_whole_and_left_out_of_training(
    write: Write, chat_model: str, cache: Path
) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(100)]))
    evaluation = write("eval.json", json.dumps([alpaca(n) for n in range(95, 105)]))
    prepared = prepare(data, model=chat_model, cache_dir=cache, eval_data=evaluation)

    assert (prepared.eval.num_examples, prepared.final.num_examples) == (10, 8)
    assert prepared.train.num_examples == 100 - 5 - 8
    assert prepared.num_duplicates_removed == 5
    assert not set(texts(prepared, Split.TRAIN)) & set(texts(prepared, Split.EVAL))


def test_evaluation_data_that_is_the_training_data_is_refused(
    write: Write, chat_model: str, cache: Path
) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(20)]))

    with pytest.raises(UserError, match="0 different examples to train on, without those that are evaluated"):
        prepare(data, model=chat_model, cache_dir=cache, eval_data=data)


def test_evaluation_data_of_another_kind_is_refused(write: Write, chat_model: str, cache: Path) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(100)]))

    with pytest.raises(UserError, match="would be of different kinds"):
        prepare(data, model=chat_model, cache_dir=cache, eval_data=write("b.txt", "once " * 500))


@given(
    contents=st.lists(st.integers(0, 60), min_size=4, max_size=120),
    seed=st.integers(0, 3),
    share=st.floats(0.01, 0.25),
    order=st.randoms(use_true_random=False),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_splits_are_disjoint_complete_and_independent_of_order(
    contents: list[int], seed: int, share: float, order: random.Random
) -> None:
    examples = [Completion(where=str(i), prompt=f"{c}", completion="x") for i, c in enumerate(contents)]
    num_different = len(set(contents))
    if num_different < 4:
        with pytest.raises(UserError, match="too few"):
            split_examples(examples, None, seed=seed, eval_share=share, final_share=share)
        return

    parts = split_examples(examples, None, seed=seed, eval_share=share, final_share=share)
    shuffled = list(examples)
    order.shuffle(shuffled)
    again = split_examples(shuffled, None, seed=seed, eval_share=share, final_share=share)

    prompts = {
        name: [example.prompt for example in getattr(parts, name)]  # type: ignore[union-attr]
        for name in ("train", "eval", "final")
    }
    assert set(prompts["train"]) | set(prompts["eval"]) | set(prompts["final"]) == {f"{c}" for c in contents}
    for one, other in (("train", "eval"), ("train", "final"), ("eval", "final")):
        assert not set(prompts[one]) & set(prompts[other])
    for name in ("eval", "final"):
        assert len(set(prompts[name])) == len(prompts[name]) >= 1
        assert [example.prompt for example in getattr(again, name)] == prompts[name]
    assert len(parts.train) + len(parts.eval) + len(parts.final) + parts.num_duplicates_removed == len(
        contents
    )
    assert sorted(prompts["train"]) == sorted(example.prompt for example in again.train)  # type: ignore[union-attr]


@pytest.mark.parametrize(("num", "of"), [(10, 5), (23, 5), (60, 3), (5, 2)])
def test_over_all_folds_each_content_is_evaluated_once(num: int, of: int) -> None:
    examples = [Completion(where=str(i), prompt=f"{i % num}", completion="x") for i in range(num + 2)]
    evaluated: list[str] = []
    for number in range(1, of + 1):
        parts = split_examples(
            examples, None, seed=0, eval_share=0.1, final_share=0.05, fold=Fold(number, of)
        )
        by_part = [{e.prompt for e in part} for part in (parts.train, parts.eval, parts.final)]  # type: ignore[union-attr]
        assert not by_part[0] & by_part[1]
        assert not by_part[1] & by_part[2]
        assert len(set.union(*by_part)) == num
        assert abs(len(parts.eval) - num / of) < 1
        assert parts.num_duplicates_removed == num + 2 - sum(map(len, (parts.train, parts.eval, parts.final)))
        evaluated += [e.prompt for e in parts.eval]  # type: ignore[union-attr]
    assert sorted(evaluated) == sorted(f"{i}" for i in range(num))


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "5", "a/b", "1/5/2", "-1/5"])
def test_what_is_no_fold_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not one of at least two folds"):
        parse_fold(text)


def test_more_folds_than_examples_are_refused() -> None:
    examples = [Completion(where=str(i), prompt=f"{i}", completion="x") for i in range(9)]
    with pytest.raises(UserError, match="too few for 5 folds") as raised:
        split_examples(examples, None, seed=0, eval_share=0.1, final_share=0.05, fold=Fold(1, 5))
    assert raised.value.remedy == "Use at most 4 folds."
