"""Several sources at once: named, each recognised by itself, used by weight, and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.dataset import DataFormat, PreparedData, Split, describe, prepare
from autosft.profiles.dataset.formats import Completion
from autosft.profiles.dataset.sources import open_sources, short_name, source_names, without_folders
from autosft.profiles.dataset.split import weighted
from autosft.profiles.errors import UserError
from tests.profiles.dataset.prepared_data import Write, alpaca, jsonl, texts
from tests.profiles.dataset.reading import assistant, user

NAMES: list[tuple[str, list[tuple[str, str | None, float]]]] = [
    ("a.jsonl", [("a.jsonl", None, 1.0)]),
    ("a.jsonl,b.jsonl", [("a.jsonl", None, 1.0), ("b.jsonl", None, 1.0)]),
    ("a.jsonl:2,b.jsonl:0.5", [("a.jsonl", None, 2.0), ("b.jsonl", None, 0.5)]),
    ("a.jsonl , b.jsonl,", [("a.jsonl", None, 1.0), ("b.jsonl", None, 1.0)]),
    ("folder:part", [("folder", "part", 1.0)]),
    ("folder:part:3,a.jsonl", [("folder", "part", 3.0), ("a.jsonl", None, 1.0)]),
    ("owner/name:2", [("owner/name", None, 2.0)]),
    ("owner/name:config,a.jsonl", [("owner/name", "config", 1.0), ("a.jsonl", None, 1.0)]),
    ("one,two.jsonl", [("one,two.jsonl", None, 1.0)]),
    ("one,two.jsonl:2", [("one,two.jsonl", None, 2.0)]),
    ("b.jsonl,one,two.jsonl:2", [("b.jsonl", None, 1.0), ("one,two.jsonl", None, 2.0)]),
    ("at 10:30.jsonl", [("at 10:30.jsonl", None, 1.0)]),
    ("a:2", [("a:2", None, 1.0)]),
    ("a:2:3", [("a:2", None, 3.0)]),
]


@pytest.mark.parametrize(("text", "expected"), NAMES, ids=[text for text, _ in NAMES])
def test_source_names_are_parsed(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    expected: list[tuple[str, str | None, float]],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "one,two.jsonl", "at 10:30.jsonl", "a:2", "folder/x.jsonl"):
        write(name, "{}")

    assert [(name.path, name.part, name.weight) for name in source_names(text)] == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.jsonl:0", "a weight of 0 is not above 0"),
        ("a.jsonl:1000", "a weight of 1000"),
        ("", "names no data"),
        (" , ", "names no data"),
        ("a.jsonl:part", "a.jsonl is a file, and a name"),
        ("a.jsonl,missing.jsonl", "missing.jsonl does not exist"),
        ("a.jsonl:-1", "a.jsonl is a file, and a name"),
    ],
)
def test_names_that_say_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", "{}")

    with pytest.raises(UserError) as error:
        open_sources(text)
    assert says in str(error.value)


def test_short_and_public_names(write: Write, tmp_path: Path) -> None:
    one, other = write("one.jsonl.gz", ""), write("deep/two.json", "")

    assert short_name(one) == "one"
    assert short_name(f"{one}:2,{other},owner/name") == "one+two+name"
    assert without_folders(f"{one}:2,{other},owner/name:3") == "one.jsonl.gz:2,two.json,owner/name:3"


def chats(word: str, count: int) -> list[dict[str, Any]]:
    return [{"messages": [user(f"{word} {n}"), assistant("ok")]} for n in range(count)]


def counts(prepared: PreparedData, word: str) -> tuple[int, int, int]:
    train, *held = (sum(f"{word} " in text for text in texts(prepared, split)) for split in Split)
    return train, held[0], held[1]


def test_each_source_is_recognised_separately_and_its_share_is_reported(
    write: Write, chat_model: str, cache: Path
) -> None:
    from datasets import Dataset

    first = write("a.jsonl", jsonl(chats("chat", 60)))
    second = write("b.json", json.dumps([alpaca(n) for n in range(40)]))
    third = str(Path(second).with_name("c.parquet"))
    Dataset.from_list([{"prompt": f"pair {n}", "completion": " ok"} for n in range(20)]).to_parquet(third)
    prepared = prepare(f"{first},{second},{third}", model=chat_model, cache_dir=cache)

    assert [share.format for share in prepared.sources] == [
        DataFormat.MESSAGES,
        DataFormat.ALPACA,
        DataFormat.PROMPT_COMPLETION,
    ]
    assert sum(share.num_examples for share in prepared.sources) == prepared.train.num_examples
    assert sum(share.num_scored for share in prepared.sources) == prepared.train.num_scored
    said = describe(prepared)
    assert said[0] == "3 sources, with their shares of the training examples"
    assert said[1].startswith(f"  {first}: OpenAI messages, ")
    assert " examples (" in said[1]
    assert said[3].startswith(f"  {third}: prompt and completion, ")


@pytest.mark.parametrize(("weight", "factor"), [("2", 2.0), ("1", 1.0), ("0.5", 0.5), ("2.25", 2.25)])
def test_a_weight_is_how_often_training_examples_are_used(
    write: Write, chat_model: str, cache: Path, weight: str, factor: float
) -> None:
    first, second = write("a.jsonl", jsonl(chats("one", 100))), write("b.jsonl", jsonl(chats("two", 100)))
    plain = prepare(f"{first},{second}", model=chat_model, cache_dir=cache)
    prepared = prepare(f"{first}:{weight},{second}", model=chat_model, cache_dir=cache)

    assert counts(prepared, "one")[0] == round(counts(plain, "one")[0] * factor)
    assert counts(prepared, "one")[1:] == counts(plain, "one")[1:]
    assert counts(prepared, "two") == counts(plain, "two")
    assert (prepared.fingerprint == plain.fingerprint) is (factor == 1.0)
    if factor != 1.0:
        used = f"each used {weight} times" if factor > 1 else "50% of it used"
        assert used in describe(prepared)[1]


def test_a_fraction_is_the_same_examples_whatever_their_order() -> None:
    examples = [Completion(where="", prompt=f"{n}", completion="x", source=n % 2) for n in range(40)]
    used = weighted(examples, [1.5, 0.25], seed=0)
    again = weighted(examples[::-1], [1.5, 0.25], seed=0)

    assert len(used) == 30 + 5
    assert [example.source for example in used] == [0] * 30 + [1] * 5
    prompts = [
        sorted(example.prompt for example in each if isinstance(example, Completion))
        for each in (used, again)
    ]
    assert prompts[0] == prompts[1]
    assert prompts[0] != sorted(
        example.prompt
        for example in weighted(examples, [1.5, 0.25], seed=1)
        if isinstance(example, Completion)
    )


def test_one_source_alone_may_have_a_weight(write: Write, chat_model: str, cache: Path) -> None:
    path = write("a.jsonl", jsonl(chats("one", 100)))
    whole = prepare(path, model=chat_model, cache_dir=cache)
    half = prepare(f"{path}:0.5", model=chat_model, cache_dir=cache)

    assert half.train.num_examples == round(whole.train.num_examples / 2)
    assert describe(half)[0] == f"{path}:0.5: OpenAI messages, 50% of it used"


def test_text_and_conversations_are_learned_together(write: Write, chat_model: str, cache: Path) -> None:
    talk = write("a.jsonl", jsonl(chats("one", 60)))
    book = write("book.txt", "".join(f"Line {n} of a long book.\n" for n in range(400)))
    prepared = prepare(f"{talk},{book}", model=chat_model, cache_dir=cache, block_size=64)

    chat, text = prepared.sources
    assert chat.num_examples > 20
    assert text.num_scored == text.num_tokens > 1000
    assert chat.num_scored < chat.num_tokens


def test_the_same_content_under_other_names_is_found_prepared(
    write: Write, chat_model: str, cache: Path
) -> None:
    first, second = write("a.jsonl", jsonl(chats("one", 40))), write("b.jsonl", jsonl(chats("two", 40)))
    prepared = prepare(f"{first},{second}:2", model=chat_model, cache_dir=cache)
    moved = [write("c.jsonl", jsonl(chats("one", 40))), write("d.jsonl", jsonl(chats("two", 40)))]
    again = prepare(f"{moved[0]},{moved[1]}:2", model=chat_model, cache_dir=cache)
    turned = prepare(f"{second}:2,{first}", model=chat_model, cache_dir=cache)

    assert again.path == prepared.path
    assert [share.name for share in again.sources] == moved
    assert turned.path != prepared.path


def test_validation_files_of_some_sources_only_are_not_read(
    write: Write, chat_model: str, cache: Path
) -> None:
    folder = Path(write("cloned/train.jsonl", jsonl(chats("one", 60)))).parent
    write("cloned/validation.jsonl", jsonl(chats("look", 20)))
    other = write("b.jsonl", jsonl(chats("two", 60)))
    prepared = prepare(f"{folder},{other}", model=chat_model, cache_dir=cache)

    assert counts(prepared, "look") == (0, 0, 0)
    assert counts(prepared, "two")[1] > 0
    assert "not read, not all sources have validation data: validation.jsonl" in "\n".join(describe(prepared))
