"""Folders as they are found: splits by name, and dataset cards."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from autosft.profiles.dataset import PreparedData, Split, describe, prepare
from autosft.profiles.dataset.sources import open_sources
from tests.profiles.dataset.found_data import CARD, lay_out, lines, words_in
from tests.profiles.dataset.prepared_data import texts


@dataclass(frozen=True, kw_only=True)
class Folder:
    case: str
    files: dict[str, str]
    trained: list[str]
    evaluated: list[str] = field(default_factory=list)  # of the validation files
    given: str = ""  # behind the folder's name


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
