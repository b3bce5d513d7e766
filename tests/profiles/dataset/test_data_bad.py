"""Data that cannot be used: one clear error with its place, or counted and left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.dataset import (
    Split,
    describe,
    prepare,
)
from autosft.profiles.errors import UserError
from tests.profiles.dataset.prepared_data import Write, alpaca, jsonl
from tests.profiles.dataset.small_tokenizer import (
    facts_of,
    tokenizer_for,
)

GOOD = [alpaca(n) for n in range(40)]


BAD_DATA = [
    ("missing", None, "no/such/file.json does not exist"),
    ("empty", ("a.jsonl", ""), "a.jsonl is empty"),
    ("no record", ("a.json", "[]"), "holds no record"),
    ("broken", ("a.jsonl", jsonl(GOOD) + '\n{"instruction": '), "a.jsonl line 41"),
    ("no answer", ("a.jsonl", jsonl([*GOOD, {**GOOD[0], "output": ""}])), "a.jsonl line 41: empty answer"),
    (
        "mixed",
        ("a.jsonl", jsonl([*GOOD, {"text": "x"}])),
        "a.jsonl line 41: mixed formats (plain text; 40 of 41 records are Alpaca instructions)",
    ),
    (
        "unknown columns",
        ("a.jsonl", jsonl([*GOOD, {"q": "x"}])),
        "line 41: no known format (its columns are q;",
    ),
    (
        "wrong columns",
        ("a.csv", "question,answer\na,b\n"),
        "a.csv line 2: no known format: its columns are question",
    ),
    ("not UTF-8", ("a.jsonl", jsonl(GOOD).encode() + b"\n\xff"), "a.jsonl line 41: not UTF-8"),
    ("too few", ("a.jsonl", jsonl(GOOD[:3])), "3 different examples to train on are too few"),
]


@pytest.mark.parametrize(("case", "file", "message"), BAD_DATA, ids=[case for case, *_ in BAD_DATA])
def test_bad_data_is_one_clear_error_and_leaves_nothing_behind(
    write: Write, chat_model: str, cache: Path, case: str, file: tuple[str, str] | None, message: str
) -> None:
    path = "no/such/file.json" if file is None else write(*file)

    with pytest.raises(UserError) as error:
        prepare(path, model=chat_model, cache_dir=cache)

    assert message in str(error.value)
    assert not cache.exists()


def test_bad_records_are_counted_by_reason_and_left_out(write: Write, chat_model: str, cache: Path) -> None:
    lines = [
        *map(json.dumps, GOOD),
        json.dumps({**GOOD[0], "output": ""}),
        "{broken",
        json.dumps({"text": "x"}),
        json.dumps({**GOOD[1], "output": " "}),
    ]
    path = write("a.jsonl", "\n".join(lines))

    with pytest.raises(UserError) as error:
        prepare(path, model=chat_model, cache_dir=cache)
    prepared = prepare(path, model=chat_model, cache_dir=cache, skip_bad_records=True)

    assert "--skip-bad-records to leave such records out (4 of 44)" in str(error.value)
    assert prepared.skipped == (("empty answer", 2), ("broken JSON", 1), ("mixed formats", 1))
    assert "left out, empty answer: 2" in describe(prepared)
    assert sum(prepared.counts(split).num_examples for split in Split) == 40


def test_what_the_template_cannot_render_is_a_bad_record_too(
    write: Write, tmp_path: Path, cache: Path
) -> None:
    tokenizer_for(facts_of("Gemma")).save_pretrained(tmp_path / "gemma")
    two_questions = [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]
    good = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "ok"}]}
        for n in range(40)
    ]
    path = write("a.jsonl", jsonl([*good, {"messages": two_questions}]))
    options: dict[str, Any] = {"model": str(tmp_path / "gemma"), "cache_dir": cache}

    with pytest.raises(UserError, match=r"line 41: the chat template cannot render it .*must alternate"):
        prepare(path, **options)
    prepared = prepare(path, **options, skip_bad_records=True)

    assert prepared.skipped == (("the chat template cannot render it", 1),)


def test_only_bad_records_are_an_error_also_when_skipped(write: Write, chat_model: str, cache: Path) -> None:
    path = write("a.jsonl", jsonl([{**record, "output": ""} for record in GOOD]))

    with pytest.raises(UserError, match="no usable record is left: 40 of 40 are bad"):
        prepare(path, model=chat_model, cache_dir=cache, skip_bad_records=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such/model"}, "no/such/model is not a model folder"),
        ({"model": "nobody/nothing"}, "no tokenizer can be loaded from nobody/nothing"),
        ({"fold": "6/5"}, "not one of at least two folds"),
        ({"eval_share": 0.0}, "above 0 and at most 0.25, not 0.0"),
        ({"final_share": 0.5}, "above 0 and at most 0.25, not 0.5"),
        ({"max_rounds": 0}, "at least one round"),
        ({"block_size": 1}, "at least 2 tokens, not 1"),
    ],
)
def test_requests_that_cannot_be_served(
    write: Write, chat_model: str, cache: Path, options: dict[str, Any], message: str
) -> None:
    if options.get("model") == "no/such/model":
        options = {"model": "./no/such/model"}
    with pytest.raises(UserError, match=message):
        prepare(write("a.jsonl", jsonl(GOOD)), **{"model": chat_model, "cache_dir": cache, **options})


def test_model_folder_without_tokenizer(write: Write, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(UserError, match="model holds no tokenizer"):
        prepare(write("a.jsonl", jsonl(GOOD)), model=str(tmp_path / "model"), cache_dir=cache)


def test_unwritable_cache_is_one_clear_error(write: Write, chat_model: str) -> None:
    taken = write("taken", "a file, not a folder")

    with pytest.raises(UserError, match="the prepared data cannot be written"):
        prepare(write("a.jsonl", jsonl(GOOD)), model=chat_model, cache_dir=Path(taken))
