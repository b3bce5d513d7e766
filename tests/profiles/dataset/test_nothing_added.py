"""Nothing is learned or read that is not in the data: no nulls of columnar files, no token twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from autosft.profiles.dataset import Split, describe, prepare
from autosft.profiles.dataset.problems import BadRecord
from tests.profiles.dataset.prepared_data import Write, jsonl, rows
from tests.profiles.dataset.reading import assistant, conversation, convert, user
from tests.profiles.dataset.small_tokenizer import facts_of, make_tokenizer, tokenizer_for


def schema(name: str, **properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


COUNT = schema("count", shelf={"type": "integer"}, deep={"type": "object"})
PAINT = schema("paint", colour={"type": "string", "enum": ["red", "blue"]})


def talk(number: int) -> dict[str, Any]:
    """A conversation that calls one function or the other, so that the structs of a table have gaps."""
    if number % 2:
        call = {"name": "count", "arguments": {"shelf": number, "deep": {"x": [{"y": 1}, {"z": "2"}]}}}
    else:
        call = {"name": "paint", "arguments": {"colour": f"c{number}"}}
    turns = [
        user(f"Do task {number}."),
        assistant("", tool_calls=[{"id": f"id{number}", "type": "function", "function": call}]),
        {"role": "tool", "content": "ok", "tool_call_id": f"id{number}"},
        assistant(f"Task {number} is done."),
    ]
    return {"messages": turns, "tools": [COUNT, PAINT] if number % 2 or number % 3 else [PAINT]}


TALKS = [talk(number) for number in range(40)]


def as_parquet(path: Path) -> str:
    pq.write_table(pa.Table.from_pylist(TALKS), path / "a.parquet")
    return str(path / "a.parquet")


def as_arrow(path: Path) -> str:
    table = pa.Table.from_pylist(TALKS)
    with pa.OSFile(str(path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return str(path / "a.arrow")


def as_saved(path: Path) -> str:
    Dataset.from_list(TALKS).save_to_disk(str(path / "saved"))
    return str(path / "saved")


def as_exported_jsonl(path: Path) -> str:
    """JSON Lines that was written from a table: the gaps stand in it as nulls."""
    lines = "\n".join(map(json.dumps, pa.Table.from_pylist(TALKS).to_pylist()))
    (path / "b.jsonl").write_text(lines)
    return str(path / "b.jsonl")


@pytest.mark.parametrize("written", [as_parquet, as_arrow, as_saved, as_exported_jsonl])
def test_a_table_gives_the_tokens_of_its_json_lines(
    write: Write, chat_model: str, cache: Path, tmp_path: Path, written: Any
) -> None:
    expected = prepare(write("a.jsonl", jsonl(TALKS)), model=chat_model, cache_dir=cache)
    prepared = prepare(written(tmp_path), model=chat_model, cache_dir=cache)

    assert prepared.path != expected.path
    for split in Split:
        for column in ("input_ids", "labels"):
            assert sorted(rows(prepared, split)[column]) == sorted(rows(expected, split)[column])
    said = "\n".join(describe(prepared))
    assert "nulls in tools or calls are left out" in said
    assert "nulls" not in "\n".join(describe(expected))


NULLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("declared, the author's", {"colour": None}, {"colour": None}),
    ("not declared, of another function", {"colour": "red", "shelf": None}, {"colour": "red"}),
    ("in a list", {"colour": [None, 1]}, {"colour": [None, 1]}),
]


@pytest.mark.parametrize(("case", "given", "expected"), NULLS, ids=[case for case, *_ in NULLS])
def test_nulls_in_json_stay_where_the_function_declares_them(
    case: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    called = assistant("", tool_calls=[{"name": "paint", "arguments": given}])
    example = conversation({"messages": [user(), called], "tools": [COUNT, PAINT]})

    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == expected, case


def test_a_default_of_null_stays_in_the_schema() -> None:
    tool = schema("f", x={"type": "string", "default": None, "description": None})
    example = conversation({"messages": [user(), assistant()], "tools": [tool]})

    assert example.tools[0]["function"]["parameters"]["properties"]["x"] == {
        "type": "string",
        "default": None,
    }


NULLED = {"name": "paint", "arguments": {"colour": None, "other": {"x": None}}}
AS_TEXT: list[tuple[str, dict[str, Any]]] = [
    ("arguments", {"tool_calls": [{"name": "paint", "arguments": json.dumps(NULLED["arguments"])}]}),
    ("call", {"tool_calls": [json.dumps(NULLED)]}),
    ("function", {"tool_calls": [{"function": json.dumps(NULLED)}]}),
    ("calls", {"tool_calls": json.dumps([NULLED])}),
    ("older call", {"function_call": json.dumps(NULLED)}),
]


@pytest.mark.parametrize(("case", "calls"), AS_TEXT, ids=[case for case, _ in AS_TEXT])
def test_nulls_in_text_are_the_authors_in_a_table_too(case: str, calls: dict[str, Any]) -> None:
    turns = [user(), assistant("", **calls)]
    for column in (turns, json.dumps(turns)):
        example = conversation({"messages": column, "tools": None}, fills_nulls=True)
        assert example.messages[1]["tool_calls"][0]["function"] == NULLED, case


def test_nulls_of_tools_in_text_are_the_authors_in_a_table_too() -> None:
    tool = schema("f", x={"type": "string", "default": None})
    given = conversation({"messages": [user(), assistant()], "tools": json.dumps([tool])}, fills_nulls=True)

    assert given.tools == (tool,)


def test_arguments_that_json_does_not_have_are_refused() -> None:
    import datetime

    called = assistant("", tool_calls=[{"name": "f", "arguments": {"at": datetime.date(2026, 11, 30)}}])
    problem = convert({"messages": [user(), called]}, fills_nulls=True)

    assert isinstance(problem, BadRecord)
    assert "arguments is not JSON" in problem.reason


def ids_of(prepared: Any) -> list[list[int]]:
    return sorted(ids for split in Split for ids in rows(prepared, split)["input_ids"])


DOUBLED: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("the end of turn", "Qwen 2.5", [("{q}", "{a}<|im_end|>"), ("{q}<|im_end|>", "{a}<|im_end|>\n")]),
    ("twice", "Qwen 2.5", [("{q}", "{a}<|im_end|><|im_end|>")]),
    ("Llama 3's end of turn", "Llama 3", [("{q}", "{a}<|eot_id|>")]),
    ("Llama 3's start", "Llama 3", [("<|begin_of_text|>{q}", "{a}")]),
    ("Mistral's end", "Mistral", [("{q}", "{a}</s>"), ("<s>{q}", "{a} </s>")]),
]


@pytest.mark.parametrize(("case", "template", "spellings"), DOUBLED, ids=[case for case, *_ in DOUBLED])
def test_control_tokens_that_stand_in_the_data_are_not_doubled(
    write: Write, tmp_path: Path, cache: Path, case: str, template: str, spellings: list[tuple[str, str]]
) -> None:
    names = [facts["name"] for facts in _templates()]
    name = next(name for name in names if name.startswith(template))
    tokenizer_for(facts_of(name)).save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"model": str(tmp_path / "model"), "cache_dir": cache}

    def talks(question: str, answer: str) -> str:
        return jsonl(
            [
                {"messages": [user(question.format(q=f"q{n}")), assistant(answer.format(a=f"a{n}"))]}
                for n in range(40)
            ]
        )

    clean = prepare(write("clean.jsonl", talks("{q}", "{a}")), **options)
    for number, (question, answer) in enumerate(spellings):
        doubled = prepare(write(f"{number}.jsonl", talks(question, answer)), **options)
        assert ids_of(doubled) == ids_of(clean), case
        assert "40 examples begin or end turns with" in "\n".join(describe(doubled))
    assert "begin or end turns" not in "\n".join(describe(clean))


def _templates() -> list[dict[str, Any]]:
    from tests.profiles.dataset.small_tokenizer import TEMPLATES

    return TEMPLATES


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "{n} is", "completion": " a number</s>"},
        {"prompt": "{n} is", "completion": " a number</s>\n"},
        {"prompt": "<s>{n} is", "completion": " a number</s></s>"},
        {"prompt": "<s>{n} is", "completion": " a number"},
    ],
    ids=str,
)
def test_completions_end_once(write: Write, tmp_path: Path, cache: Path, record: dict[str, str]) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"model": str(tmp_path / "model"), "cache_dir": cache}

    def filled(pair: dict[str, str]) -> str:
        return jsonl([{key: value.format(n=n) for key, value in pair.items()} for n in range(40)])

    clean = prepare(write("b.jsonl", filled({"prompt": "{n} is", "completion": " a number"})), **options)
    prepared = prepare(write("a.jsonl", filled(record)), **options)

    assert ids_of(prepared) == ids_of(clean)
    assert "it is not doubled" in "\n".join(describe(prepared))


def test_texts_end_once(write: Write, plain_model: str, cache: Path) -> None:
    texts = [f"Text number {n} has an end." for n in range(40)]
    options: dict[str, Any] = {"model": plain_model, "cache_dir": cache, "block_size": 4096}
    clean = prepare(write("a.jsonl", jsonl([{"text": text} for text in texts])), **options)
    for number, end in enumerate(("</s>", "</s>\n")):
        ended = prepare(write(f"{number}.jsonl", jsonl([{"text": text + end} for text in texts])), **options)

        num_tokens = [sum(map(len, ids_of(prepared))) for prepared in (clean, ended)]
        assert num_tokens[0] == num_tokens[1]
        assert "40 passages begin or end with <s> or </s>: it is not added" in "\n".join(describe(ended))


def test_results_in_the_tags_that_the_template_writes_are_not_wrapped_twice(
    write: Write, chat_model: str, cache: Path
) -> None:
    def talks(result: str) -> str:
        turns = [
            ("human", "q{n}"),
            ("gpt", "<tool_call>\n{{}}\n</tool_call>"),
            ("tool", result),
            ("gpt", "a{n}"),
        ]
        return jsonl(
            [
                {"conversations": [{"from": who, "value": text.format(n=n)} for who, text in turns]}
                for n in range(40)
            ]
        )

    clean = prepare(write("a.jsonl", talks("7")), model=chat_model, cache_dir=cache)
    tagged = prepare(
        write("b.jsonl", talks("<tool_response>\n7\n</tool_response>")), model=chat_model, cache_dir=cache
    )

    assert ids_of(tagged) == ids_of(clean)
    assert "40 examples have <tool_response> around the results" in "\n".join(describe(tagged))
