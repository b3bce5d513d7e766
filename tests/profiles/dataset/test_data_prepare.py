"""Preparing: splits, cache, lengths, and what the user is told; on made data and on real files."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from autosft.profiles.dataset import (
    DataFormat,
    PreparedData,
    Split,
    choose_seq_len,
    describe,
    eval_fingerprint,
    length_profile,
    load_prepared,
    prepare,
    sample_with_mask,
    truncation_report,
)
from autosft.profiles.dataset.formats import Completion, Passage
from autosft.profiles.dataset.prepared import IGNORED
from autosft.profiles.dataset.split import cut_passages, split_examples
from autosft.profiles.dataset.tokens import pack, tokenize_completions
from autosft.profiles.errors import UserError
from tests.profiles.dataset.small_tokenizer import (
    facts_of,
    llama_like_tokenizer,
    make_tokenizer,
    tokenizer_for,
)

Write = Callable[[str, "str | bytes"], str]

SHARED = Path(os.environ.get("AUTOSFT_SHARED", Path(__file__).parents[4] / "shared"))
needs_shared_data = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason="the shared data is not beside this checkout (AUTOSFT_SHARED)"
)


def alpaca(number: int) -> dict[str, str]:
    return {
        "instruction": f"Add one to {number}.",
        "input": "",
        "output": f"{number + 1}" + " ok" * (number % 7),
    }


def jsonl(records: Sequence[dict[str, Any]]) -> str:
    return "\n".join(map(json.dumps, records))


def rows(prepared: PreparedData, split: Split) -> Dataset:
    return load_from_disk(str(prepared.split_dir(split)))


def texts(prepared: PreparedData, split: Split) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    return [tokenizer.decode(ids) for ids in rows(prepared, split)["input_ids"]]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


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

    with pytest.raises(UserError, match="would not be of one kind"):
        prepare(data, model=chat_model, cache_dir=cache, eval_data=write("b.txt", "once " * 500))


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


def test_own_template_is_said_and_saved(write: Write, plain_model: str, cache: Path) -> None:
    data = write("a.jsonl", jsonl([alpaca(n) for n in range(50)]))
    prepared = prepare(data, model=plain_model, cache_dir=cache)

    assert prepared.own_template
    assert any("has no chat template: a plain ChatML one is used" in line for line in describe(prepared))
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == "<|im_start|>user\nHi</s>\n<|im_start|>assistant\n"


def test_control_tokens_in_the_text_are_said(write: Write, chat_model: str, cache: Path) -> None:
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


def test_completions_score_the_completion_and_its_end(write: Write, plain_model: str, cache: Path) -> None:
    """Also where one token would hold letters of both: "...answ" + "er is"."""
    pairs = [("The answ", "er is four"), ("Two plus two is ", "four"), ("Say:\n", " a b ")]
    records = [{"prompt": f"{n} {asked}", "completion": told} for n in range(10) for asked, told in pairs]
    prepared = prepare(write("a.jsonl", jsonl(records)), model=plain_model, cache_dir=cache)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)

    assert prepared.format is DataFormat.PROMPT_COMPLETION
    expected = {f"{record['prompt']}|{record['completion']}</s>" for record in records}
    for split in Split:
        for row in rows(prepared, split):
            cut = row["first_label"]
            assert IGNORED not in row["labels"][cut:]
            parts = (tokenizer.decode(ids) for ids in (row["input_ids"][:cut], row["input_ids"][cut:]))
            prompt, completion = parts
            # White space between the two may stand in the completion's first token.
            whole = f"{prompt}{completion}"
            assert any(whole == each.replace("|", "") for each in expected)
            assert any(
                completion.strip() == each.split("|")[1].strip()
                and prompt.strip() == each.split("|")[0].strip()
                for each in expected
            )


def test_text_is_packed_into_blocks_of_which_every_token_is_scored(
    write: Write, plain_model: str, cache: Path
) -> None:
    documents = [f"Document {n} speaks of the rain in Paris, {n} times. " * 3 for n in range(60)]
    data = write("a.jsonl", jsonl([{"text": text} for text in documents]))
    prepared = prepare(data, model=plain_model, cache_dir=cache, block_size=32)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)

    whole = ""
    for split in Split:
        blocks = rows(prepared, split)["input_ids"]
        assert rows(prepared, split)["labels"] == blocks
        assert {len(block) for block in blocks[:-1]} == {32}
        assert len(blocks[-1]) <= 32
        whole += tokenizer.decode([token for block in blocks for token in block])
    assert sorted(whole.removesuffix("</s>").split("</s>")) == sorted(documents)
    assert prepared.notes == ()


def test_end_tokens_stand_where_the_text_does_not_go_on() -> None:
    """The third part of the first document is missing: held out, say."""
    tokenizer = make_tokenizer()
    parts = [(0, 0, "one "), (0, 1, "two"), (0, 3, "four"), (1, 0, "five")]
    passages = [Passage(where="x", text=text, document=number, part=part) for number, part, text in parts]

    (block,) = pack(tokenizer, passages, 1000)

    assert tokenizer.decode(block.input_ids) == "one two</s>four</s>five</s>"


def test_a_tokenizer_that_starts_texts_starts_documents_too() -> None:
    tokenizer = llama_like_tokenizer("none: our own")
    passages = [
        Passage(where="x", text=text, document=number)
        for number, text in enumerate(("The rain", "The answer"))
    ]

    (block,) = pack(tokenizer, passages, 1000)
    (pair,) = tokenize_completions(
        tokenizer, [Completion(where="x", prompt="The rain", completion=" in Paris")]
    )

    assert tokenizer.decode(block.input_ids) == "<s> The rain</s><s> The answer</s>"
    assert tokenizer.decode(pair.input_ids) == "<s> The rain in Paris</s>"
    assert tokenizer.decode(pair.labels[pair.labels != IGNORED]) == "in Paris</s>"


def test_one_long_text_is_held_out_in_parts(write: Write, plain_model: str, cache: Path) -> None:
    lines = [f"Line {n} of a long book.\n" for n in range(2000)]
    prepared = prepare(write("book.txt", "".join(lines)), model=plain_model, cache_dir=cache, block_size=64)

    found = {
        split: [line for text in ["".join(texts(prepared, split))] for line in text.splitlines()]
        for split in Split
    }
    numbers = sorted(
        line.removeprefix("</s>") for split in Split for line in found[split] if line not in ("", "</s>")
    )
    assert numbers == sorted(line.strip() for line in lines)
    assert len(found[Split.TRAIN]) > 1500


def test_text_longer_than_the_model_is_refused(write: Write, plain_model: str, cache: Path) -> None:
    with pytest.raises(UserError, match="longer than the model's longest, 64"):
        prepare(write("a.txt", "x"), model=plain_model, cache_dir=cache, block_size=128, max_positions=64)


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


@given(
    documents=st.lists(st.text(alphabet="ab \n日", min_size=1, max_size=3000), min_size=1, max_size=4),
    block_size=st.sampled_from([2, 64, 1024]),
)
@settings(deadline=None)
def test_passages_are_the_documents_in_pieces(documents: list[str], block_size: int) -> None:
    passages = cut_passages([Passage(where="x", text=text) for text in documents], block_size)

    for number, text in enumerate(documents):
        parts = [passage for passage in passages if passage.document == number]
        assert "".join(passage.text for passage in parts) == text
        assert [passage.part for passage in parts] == list(range(len(parts)))


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
