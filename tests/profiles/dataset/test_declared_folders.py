"""Folders that declare their data: saved data sets, LLaMA-Factory's registry, cards that do not hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.sources import open_sources
from autosft.profiles.errors import UserError
from tests.profiles.dataset.found_data import CARD, lay_out, lines, pairs, words_in

SAVED = DatasetDict({name: Dataset.from_list(pairs(name)) for name in ("train", "validation", "test")})


def test_saved_data_sets(tmp_path: Path) -> None:
    SAVED["train"].save_to_disk(tmp_path / "one")
    SAVED["train"].select(range(5, 10)).save_to_disk(tmp_path / "selected")
    SAVED["train"].save_to_disk(tmp_path / "shards", num_shards=3)
    SAVED.save_to_disk(tmp_path / "all")
    for name in ("train", "test"):
        SAVED[name].save_to_disk(tmp_path / "apart" / name)
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"stale")

    for name in ("one", "shards", "all", "apart"):
        assert words_in(str(tmp_path / name)) == ["train"], name
    assert words_in(f"{tmp_path / 'all'}:test") == ["test"]
    assert words_in(str(tmp_path / "one" / "data-00000-of-00001.arrow")) == ["train"]
    (source,) = open_sources(str(tmp_path / "selected"))
    assert [record.fields["prompt"] for record in source.records()] == [f"train {n}:" for n in range(5, 10)]  # type: ignore[union-attr]
    (source,) = open_sources(str(tmp_path / "all"))
    assert len(list(source.validation_records())) == 40


@dataclass(frozen=True, kw_only=True)
class Registry:
    case: str
    entry: dict[str, Any]
    record: dict[str, Any]
    messages: list[tuple[str, str]]


TALK = [("system", "s"), ("user", "a"), ("assistant", "b")]
REGISTRIES = [
    Registry(
        case="defaults", entry={}, record={"instruction": "a", "output": "b", "system": "s"}, messages=TALK
    ),
    Registry(
        case="columns",
        entry={"columns": {"prompt": "ask", "response": "reply", "system": "who"}},
        record={"ask": "a", "reply": "b", "who": "s"},
        messages=TALK,
    ),
    Registry(
        case="query and history",
        entry={"columns": {"prompt": "p", "query": "q", "response": "r", "history": "h"}},
        record={"p": "x", "q": "y", "r": "z", "h": [["a", "b"]]},
        messages=[("user", "a"), ("assistant", "b"), ("user", "x\ny"), ("assistant", "z")],
    ),
    Registry(
        case="sharegpt",
        entry={"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "who"}},
        record={
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "who": "s",
        },
        messages=TALK,
    ),
    Registry(
        case="tags",
        entry={
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {
                "role_tag": "who",
                "content_tag": "what",
                "user_tag": "Q",
                "assistant_tag": "A",
                "system_tag": "S",
            },
        },
        record={"talk": [{"who": "S", "what": "s"}, {"who": "Q", "what": "a"}, {"who": "A", "what": "b"}]},
        messages=TALK,
    ),
    Registry(
        case="openai",
        entry={"formatting": "openai", "columns": {"messages": "messages"}},
        record={"messages": [{"role": role, "content": text} for role, text in TALK]},
        messages=TALK,
    ),
    Registry(
        case="tags of OpenAI's roles",
        entry={
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        },
        record={"messages": [{"role": role, "content": text} for role, text in TALK]},
        messages=TALK,
    ),
]


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.case)
def test_llama_factorys_registry_is_followed(tmp_path: Path, registry: Registry) -> None:
    from tests.profiles.dataset.reading import conversation

    entry = {"file_name": "mine.json", **registry.entry}
    lay_out(
        tmp_path,
        {"dataset_info.json": json.dumps({"mine": entry}), "mine.json": json.dumps([registry.record])},
    )
    for text in (str(tmp_path), f"{tmp_path}:mine", str(tmp_path / "dataset_info.json")):
        (source,) = open_sources(text)
        (record,) = source.records()
        assert isinstance(record, Record)
        example = conversation(dict(record.fields))
        assert [(turn["role"], turn["content"]) for turn in example.messages] == registry.messages


def test_columns_of_a_registry_are_read_from_parquet(tmp_path: Path) -> None:
    Dataset.from_list([{"ask": "a", "reply": "b", "other": 1}]).to_parquet(str(tmp_path / "m.parquet"))
    entry = {"file_name": "m.parquet", "columns": {"prompt": "ask", "response": "reply"}}
    lay_out(tmp_path, {"dataset_info.json": json.dumps({"m": entry})})
    (source,) = open_sources(str(tmp_path))
    (record,) = source.records()

    assert isinstance(record, Record)
    assert {key: record.fields[key] for key in ("instruction", "output")} == {
        "instruction": "a",
        "output": "b",
    }


def registry(**entries: dict[str, Any]) -> str:
    return json.dumps(entries)


ONE = {"file_name": "p.jsonl"}
TWO_ON_A_CARD = CARD.format(
    "- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: a.jsonl"
)
REFUSED: list[tuple[str, dict[str, str], str, tuple[str, ...]]] = [
    ("only test data", {"test.jsonl": "a"}, "", ("holds no data to train on", "test.jsonl")),
    ("no data", {"README.md": "# x"}, "", ("holds no data file",)),
    ("only a licence", {"LICENSE.txt": "# x"}, "", ("holds no data file",)),
    ("no such split", {"train.jsonl": "a"}, ":test", ("no data set, folder or split 'test'", "train")),
    (
        "several, none named",
        {
            "dataset_info.json": registry(p=ONE, q={"file_name": "q.jsonl"}),
            "p.jsonl": "a",
            "q.jsonl": "b",
        },
        "",
        ("lists 2 data sets that are here: p, q", ":p"),
    ),
    (
        "unknown name",
        {"dataset_info.json": registry(p=ONE), "p.jsonl": "a"},
        ":q",
        ("no data set 'q'", "It has p"),
    ),
    (
        "not here",
        {"dataset_info.json": registry(p=ONE, q={"hf_hub_url": "x/y"})},
        "",
        ("no data set whose file is here: p, q",),
    ),
    (
        "preference",
        {"dataset_info.json": registry(p={**ONE, "ranking": True}), "p.jsonl": "a"},
        "",
        ("preference training",),
    ),
    (
        "unknown formatting",
        {"dataset_info.json": registry(p={**ONE, "formatting": "z"}), "p.jsonl": "a"},
        "",
        ("formatting 'z'",),
    ),
    (
        "images",
        {"dataset_info.json": registry(p={**ONE, "columns": {"images": "i"}}), "p.jsonl": "a"},
        "",
        ("columns images cannot be read",),
    ),
    (
        "several on a card",
        {"README.md": TWO_ON_A_CARD, "a.jsonl": "a"},
        "",
        ("declares 2 data sets: one, two", ":one"),
    ),
    (
        "missing on a card",
        {"README.md": CARD.format("- config_name: one\n  data_files: b.jsonl"), "a.jsonl": "a"},
        "",
        ("names b.jsonl",),
    ),
    (
        "outside",
        {"README.md": CARD.format("- config_name: one\n  data_files: ../*.jsonl"), "a.jsonl": "a"},
        "",
        ("outside of the folder",),
    ),
]


@pytest.mark.parametrize(("case", "files", "given", "says"), REFUSED, ids=[case for case, *_ in REFUSED])
def test_folders_of_which_the_data_cannot_be_told(
    tmp_path: Path, case: str, files: dict[str, str], given: str, says: tuple[str, ...]
) -> None:
    lay_out(tmp_path / "cloned", files)
    (tmp_path / "other.jsonl").write_text(lines("x"))

    with pytest.raises(UserError) as error:
        open_sources(f"{tmp_path / 'cloned'}{given}")
    for said in says:
        assert said in str(error.value), case
