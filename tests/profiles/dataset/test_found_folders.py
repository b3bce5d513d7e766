"""Folders as they are found: splits by name, dataset cards, saved data sets, LLaMA-Factory's registry."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from autosft.profiles.dataset import PreparedData, Split, describe, prepare
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.sources import open_sources
from autosft.profiles.errors import UserError
from tests.profiles.dataset.prepared_data import texts


def pairs(word: str, count: int = 40) -> list[dict[str, str]]:
    return [{"prompt": f"{word} {n}:", "completion": " x"} for n in range(count)]


def lines(word: str, count: int = 40) -> str:
    return "\n".join(map(json.dumps, pairs(word, count)))


def lay_out(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if content.startswith(("---", "{", "[", "#")) else lines(content))


def words_in(text: str, *, is_evaluated: bool = False) -> list[str]:
    """The words of the records that are read to learn from."""
    records = [
        record for source in open_sources(text, is_evaluated=is_evaluated) for record in source.records()
    ]
    assert all(isinstance(record, Record) for record in records), records
    found = (str(record.fields["prompt"]).split()[0] for record in records)  # type: ignore[union-attr]
    return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Folder:
    case: str
    files: dict[str, str]
    trained: list[str]
    evaluated: list[str] = field(default_factory=list)  # of the validation files
    given: str = ""  # behind the folder's name


CARD = "---\nlicense: mit\nconfigs:\n{}\n---\n# About\n"
FOLDERS = [
    Folder(case="files", files={"train.jsonl": "a", "test.jsonl": "b"}, trained=["a"]),
    Folder(
        case="three files",
        files={"train.jsonl": "a", "validation.jsonl": "c", "test.jsonl": "b"},
        trained=["a"],
        evaluated=["c"],
    ),
    Folder(
        case="shards",
        files={
            "data/train-00000-of-00002.jsonl": "a",
            "data/train-00001-of-00002.jsonl": "b",
            "data/test-00000-of-00001.jsonl": "c",
        },
        trained=["a", "b"],
    ),
    Folder(case="folders", files={"train/x.jsonl": "a", "dev/x.jsonl": "b"}, trained=["a"], evaluated=["b"]),
    Folder(
        case="words in names",
        files={"my_train_v2.jsonl": "a", "my.val.jsonl": "b", "my-eval.jsonl": "c"},
        trained=["a"],
        evaluated=["b"],
    ),
    Folder(
        case="words run together",
        files={"trainset.jsonl": "a", "testset.jsonl": "b", "valdata.jsonl": "c"},
        trained=["a"],
        evaluated=["c"],
    ),
    Folder(case="held out", files={"chats.jsonl": "a", "held_out.jsonl": "b"}, trained=["a"]),
    Folder(case="holdout", files={"chats.jsonl": "a", "holdout/x.jsonl": "b"}, trained=["a"]),
    Folder(case="Hive", files={"split=train/x.jsonl": "a", "split=test/x.jsonl": "b"}, trained=["a"]),
    Folder(case="no split for training", files={"all.jsonl": "a", "test.jsonl": "b"}, trained=["a"]),
    Folder(case="words within words", files={"contest.jsonl": "a", "latest.jsonl": "b"}, trained=["a", "b"]),
    Folder(case="others beside train", files={"train.jsonl": "a", "extra.jsonl": "b"}, trained=["a"]),
    Folder(
        case="a file outranks its folder",
        files={"test/train.jsonl": "a", "test/test.jsonl": "b"},
        trained=["a"],
    ),
    Folder(
        case="facts beside data",
        files={
            "train.jsonl": "a",
            "dataset_infos.json": '{"default": {"features": {}}}',
            "README.md": "# about",
            "LICENSE.txt": "# MIT",
            "requirements.txt": "# datasets",
        },
        trained=["a"],
    ),
    Folder(case="notes beside data", files={"a.jsonl": "a", "notes.txt": "# my notes"}, trained=["a"]),
    Folder(
        case="one split by name",
        files={"train.jsonl": "a", "test.jsonl": "b"},
        trained=["b"],
        given=":test",
    ),
    Folder(
        case="a folder by name",
        files={"one/train.jsonl": "a", "two/train.jsonl": "b"},
        trained=["b"],
        given=":two",
    ),
    Folder(
        case="a card, splits",
        files={
            "README.md": CARD.format(
                "- config_name: default\n  data_files:\n  - split: train\n    path: x/*.jsonl\n"
                "  - split: test\n    path: y.jsonl"
            ),
            "x/1.jsonl": "a",
            "x/2.jsonl": "b",
            "y.jsonl": "c",
            "train.jsonl": "d",
        },
        trained=["a", "b"],
    ),
    Folder(
        case="a card, one pattern",
        files={
            "README.md": CARD.format("- config_name: main\n  data_files: 'x*.jsonl'"),
            "x1.jsonl": "a",
            "y.jsonl": "b",
        },
        trained=["a"],
    ),
    Folder(
        case="a card, a list and a folder",
        files={
            "README.md": CARD.format(
                "- config_name: main\n  data_dir: sub\n  data_files: [a.jsonl, b.jsonl]"
            ),
            "sub/a.jsonl": "a",
            "sub/b.jsonl": "b",
            "sub/c.jsonl": "c",
        },
        trained=["a", "b"],
    ),
    Folder(
        case="a card, only a folder",
        files={
            "README.md": CARD.format("- config_name: main\n  data_dir: sub"),
            "sub/train.jsonl": "a",
            "b.jsonl": "b",
        },
        trained=["a"],
    ),
    Folder(
        case="a card, the default of several",
        files={
            "README.md": CARD.format(
                "- config_name: one\n  data_files: one.jsonl\n"
                "- config_name: two\n  default: true\n  data_files: two.jsonl"
            ),
            "one.jsonl": "a",
            "two.jsonl": "b",
        },
        trained=["b"],
    ),
    Folder(
        case="a card, one of several by name",
        files={
            "README.md": CARD.format(
                "- config_name: one\n  data_files: one.jsonl\n- config_name: two\n  data_files: two.jsonl"
            ),
            "one.jsonl": "a",
            "two.jsonl": "b",
        },
        trained=["a"],
        given=":one",
    ),
    Folder(
        case="a card, validation",
        files={
            "README.md": CARD.format(
                "- config_name: d\n  data_files:\n    train: t.jsonl\n    validation: v.jsonl"
            ),
            "t.jsonl": "a",
            "v.jsonl": "b",
        },
        trained=["a"],
        evaluated=["b"],
    ),
    Folder(
        case="a card without configs",
        files={"README.md": "---\nlicense: mit\n---\n", "a.jsonl": "a"},
        trained=["a"],
    ),
    Folder(
        case="a card that is broken", files={"README.md": "---\n: [\n---\n", "a.jsonl": "a"}, trained=["a"]
    ),
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.case)
def test_test_data_is_not_trained_on(tmp_path: Path, folder: Folder) -> None:
    lay_out(tmp_path / "cloned", folder.files)
    (source,) = open_sources(f"{tmp_path / 'cloned'}{folder.given}")

    assert words_in(f"{tmp_path / 'cloned'}{folder.given}") == folder.trained
    evaluated = [record.fields["prompt"].split()[0] for record in source.validation_records()]  # type: ignore[union-attr]
    assert list(dict.fromkeys(evaluated)) == folder.evaluated


def test_what_is_said_of_files_is_said_of_these_files(tmp_path: Path, plain_model: str, cache: Path) -> None:
    """Prepared data is kept by content, and another folder may hold the same to train on."""
    lines = "\n".join(json.dumps({"prompt": f"a {n}", "completion": "b"}) for n in range(40))
    for name, files in {"one": ("train", "test"), "two": ("train",), "three": ("train", "test")}.items():
        (tmp_path / name).mkdir()
        for split in files:
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
        said = describe(prepare(str(tmp_path / name), model=plain_model, cache_dir=cache))
        not_read = [line for line in said if "not read" in line]
        assert not_read == ([f"  {tmp_path / name}: not read: test.jsonl"] if "test" in files else [])


def test_the_name_of_the_folder_itself_says_nothing(tmp_path: Path) -> None:
    lay_out(tmp_path / "test", {"a.jsonl": "a"})

    assert words_in(str(tmp_path / "test")) == ["a"]


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path: Path) -> None:
    lay_out(tmp_path, {"test.jsonl": "a"})

    assert words_in(str(tmp_path / "test.jsonl")) == ["a"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train.jsonl": "a", "validation.jsonl": "b", "test.jsonl": "c"}, ["b"]),
        ({"train.jsonl": "a", "test.jsonl": "c"}, ["c"]),
        ({"x.jsonl": "a"}, ["a"]),
        ({"train.jsonl": "a"}, ["a"]),
    ],
)
def test_of_a_folder_to_evaluate_on_its_own_split_is_read(
    tmp_path: Path, files: dict[str, str], expected: list[str]
) -> None:
    lay_out(tmp_path / "cloned", files)

    assert words_in(str(tmp_path / "cloned"), is_evaluated=True) == expected


def prepared_words(prepared: PreparedData) -> dict[Split, set[str]]:
    return {split: {text.split()[0] for text in texts(prepared, split)} for split in Split}


def test_validation_is_evaluated_on_and_test_is_neither(
    tmp_path: Path, plain_model: str, cache: Path
) -> None:
    lay_out(tmp_path / "cloned", {"train.jsonl": "learn", "val.jsonl": "look", "test.jsonl": "secret"})
    prepared = prepare(str(tmp_path / "cloned"), model=plain_model, cache_dir=cache)

    assert prepared_words(prepared) == {Split.TRAIN: {"learn"}, Split.EVAL: {"look"}, Split.FINAL: {"learn"}}
    said = "\n".join(describe(prepared))
    assert "evaluated on, not trained on: val.jsonl" in said
    assert "not read: test.jsonl" in said


def test_other_evaluation_data_takes_the_place_of_validation_files(
    tmp_path: Path, plain_model: str, cache: Path
) -> None:
    lay_out(tmp_path / "cloned", {"train.jsonl": "learn", "val.jsonl": "look"})
    lay_out(tmp_path, {"mine.jsonl": "mine"})
    prepared = prepare(
        str(tmp_path / "cloned"),
        eval_data=str(tmp_path / "mine.jsonl"),
        model=plain_model,
        cache_dir=cache,
    )

    assert prepared_words(prepared)[Split.EVAL] == {"mine"}
    assert "not read, other data is given to evaluate on: val.jsonl" in "\n".join(describe(prepared))


def test_a_large_validation_file_is_used_in_part(tmp_path: Path, plain_model: str, cache: Path) -> None:
    lay_out(tmp_path / "cloned", {"train.jsonl": "learn"})
    (tmp_path / "cloned" / "val.jsonl").write_text(lines("look", 700))
    prepared = prepare(str(tmp_path / "cloned"), model=plain_model, cache_dir=cache)

    assert prepared.eval.num_examples == 500
    assert "val.jsonl, 500 of their 700 examples" in "\n".join(describe(prepared))


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
