"""Inputs that people have reported about other programs (docs/inputs.md), in small ones of our own."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.dataset import Split, describe, prepare
from autosft.profiles.dataset.convert import LeftOut
from autosft.profiles.dataset.formats import Conversation
from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.sources import open_source
from tests.profiles.dataset.prepared_data import Write, jsonl, rows
from tests.profiles.dataset.reading import assistant, conversation, convert, gpt, human, user
from tests.profiles.dataset.small_tokenizer import facts_of, tokenizer_for

TALK = [user("a"), assistant("b")]


def read(path: str) -> list[dict[str, Any]]:
    records = list(open_source(path).records())
    assert all(isinstance(record, Record) for record in records), records
    return [dict(record.fields) for record in records]  # type: ignore[union-attr]


@pytest.mark.parametrize("user_tag", ["human", "user"])
def test_tags_of_a_registry_that_are_not_those_of_the_data(write: Write, user_tag: str) -> None:
    """hiyouga/LlamaFactory#8197, QwenLM/Qwen3#1314: such records were skipped, or ended the run."""
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": user_tag, "assistant_tag": "gpt"}
    entry = {"file_name": "m.json", "formatting": "sharegpt", "tags": tags}
    write(
        "f/m.json",
        json.dumps([{"conversations": [human("a"), gpt("b"), {"from": "user", "value": "c"}, gpt("d")]}]),
    )
    folder = Path(write("f/dataset_info.json", json.dumps({"m": entry}))).parent
    (fields,) = read(str(folder))

    assert [turn["role"] for turn in conversation(fields).messages] == ["user", "assistant"] * 2


def test_a_table_of_conversations_by_row_with_marks(write: Write) -> None:
    """hiyouga/LlamaFactory#2571: columns by row, `loss` true, false or null in each turn."""
    turns = [human("a", loss=None), gpt("OK", loss=False), human("b", loss=None), gpt("c", loss=True)]
    content = {"conversations": {"0": turns, "1": turns}, "id": {"0": "x_0", "1": "x_1"}}
    records = read(write("a.json", json.dumps(content)))

    assert [record["id"] for record in records] == ["x_0", "x_1"]
    assert conversation(records[1]).learned == (3,)


def test_a_record_of_which_nothing_is_to_be_learned_among_others(
    write: Write, chat_model: str, cache: Path
) -> None:
    """modelscope/ms-swift#6304: `loss` false in some records, no such key in others."""
    marked = {"messages": [user("marked"), assistant("<think>\n\n</think>\n\nx", loss=False)], "channel": "c"}
    records = [{"messages": [user(f"q{n}"), assistant(f"a{n}")]} for n in range(40)]
    prepared = prepare(write("a.jsonl", jsonl([marked, *records])), model=chat_model, cache_dir=cache)

    assert isinstance(convert(marked), LeftOut)
    assert sum(len(rows(prepared, split)) for split in Split) == 40
    said = "\n".join(describe(prepared))
    assert "1 record left out: all their answers are marked as not to be learned" in said
    assert "columns not used: channel" in said


@pytest.mark.parametrize("written", [json.dumps, str], ids=["JSON", "Python"])
def test_messages_in_a_table_of_text(write: Write, written: Any) -> None:
    """modelscope/ms-swift#10120: true, false and null in JSON, and lists as Python writes them."""
    talk = [
        user('it\'s "a"'),
        assistant(None, tool_calls=[{"name": "f", "arguments": {"on": True, "off": None}}]),
    ]
    talk = [
        *talk,
        {"role": "tool", "content": "7"},
        assistant("b", loss=False),
        user("c"),
        assistant("d", loss=True),
    ]
    table = io.StringIO()
    csv.writer(table).writerows([["messages", "tools"], [written(talk), written([{"name": "f"}])]])
    (fields,) = read(write("a.csv", table.getvalue()))
    example = conversation(fields)

    assert example.learned == (1, 5)
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"on": True, "off": None}
    assert example.tools[0]["function"] == {"name": "f"}


LISTS: list[tuple[str, str]] = [
    ("a list a line around a record", "\n".join(json.dumps([{"messages": TALK}]) for _ in range(2))),
    ("a list of turns a line", "\n".join(json.dumps(TALK) for _ in range(2))),
    ("an array of lists of turns", json.dumps([TALK, TALK])),
]


@pytest.mark.parametrize(("case", "content"), LISTS, ids=[case for case, _ in LISTS])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_records_within_lists(write: Write, suffix: str, case: str, content: str) -> None:
    """THUDM/LongCite#11: every line is a list of one record."""
    if suffix == "json" and "line" in case:
        pytest.skip("JSON Lines of lists are no JSON")
    assert read(write(f"a.{suffix}", content)) == [{"messages": TALK}] * 2


def test_columns_of_changing_types(write: Write) -> None:
    """huggingface/datasets#7322, RUC-NLPIR/FlashRAG#132: other columns may hold anything."""
    others: list[Any] = [{"a": 1}, [1], "x", 3, None, [[1, "a"]]]
    records = read(write("a.jsonl", jsonl([{"messages": TALK, "meta": other} for other in others])))

    assert all(conversation(record).learned == (1,) for record in records)


def test_quotes_in_tab_separated_values(write: Write) -> None:
    """pytorch/text#612: a line that starts with a quotation mark swallowed those behind it."""
    rows_ = [("First", "first"), ('"Second', "second"), ('Third "sentence"', "third"), ("Fourth", '"fourth"')]
    plain = "prompt\tcompletion\n" + "".join(f"{one}\t{other}\n" for one, other in rows_)
    quoted = 'prompt\tcompletion\n"two\nlines"\t"a ""word"""\n'

    assert [tuple(fields.values()) for fields in read(write("a.tsv", plain))] == rows_
    assert [tuple(fields.values()) for fields in read(write("b.tsv", quoted))] == [("two\nlines", 'a "word"')]


def test_text_that_has_its_own_first_and_last_token(write: Write, tmp_path: Path, cache: Path) -> None:
    """huggingface/autotrain-advanced#753, huggingface/trl#1400: who writes <s> and </s>, and how often?"""
    tokenizer_for(facts_of("Mistral 7B Instruct v0.1")).save_pretrained(tmp_path / "m")
    talks = [{"text": f"<s>[INST] q{n} [/INST] a{n}</s>"} for n in range(40)]
    prepared = prepare(
        write("a.jsonl", jsonl(talks)), model=str(tmp_path / "m"), cache_dir=cache, block_size=512
    )
    ids = [token for split in Split for row in rows(prepared, split)["input_ids"] for token in row]

    assert ids.count(0) == ids.count(1) == 40  # <s>, </s>


def test_the_end_of_a_turn_is_learned_where_it_is_not_the_end_of_text(
    write: Write, tmp_path: Path, cache: Path
) -> None:
    """axolotl-ai-cloud/axolotl#3754: Gemma's <end_of_turn> was masked, and models never stopped."""
    tokenizer = tokenizer_for(facts_of("Gemma"))
    tokenizer.save_pretrained(tmp_path / "m")
    talks = [
        {"messages": [user(f"q{n}"), assistant(f"a{n}"), user("and?"), assistant("so.")]} for n in range(40)
    ]
    prepared = prepare(write("a.jsonl", jsonl(talks)), model=str(tmp_path / "m"), cache_dir=cache)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")

    assert all(row.count(end) == 2 for row in rows(prepared, Split.TRAIN)["labels"])


def test_answers_without_a_question_are_refused_in_one_sentence() -> None:
    """modelscope/ms-swift#2750: text for pre-training as a conversation of one answer."""
    problem = convert({"messages": [assistant("I love music")]})

    assert isinstance(problem, BadRecord)
    assert problem.reason == "starts with an assistant turn"
    assert isinstance(convert({"messages": TALK}), Conversation)
