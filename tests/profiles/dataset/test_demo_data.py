from __future__ import annotations

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from autosft.profiles.dataset.demo import (
    Example,
    demo_examples,
    is_correct,
    pretraining_notes,
    vocabulary,
    write_demo_data,
)

OPPOSITES = {"hot": "cold", "cold": "hot", "tall": "short", "early": "late", "weak": "strong"}
KINDS = {"fox": "animal", "pear": "fruit", "saw": "tool", "tram": "vehicle", "belt": "garment"}


def examples_of(path: Path) -> list[Example]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def words_asked_about(example: Example) -> tuple[str, ...]:
    return tuple(example["messages"][-2]["content"].split()[-3:])


def plain_examples(instruction: str) -> list[tuple[list[str], list[str]]]:
    """Words and answer of the chats without a system turn that ask `instruction`."""
    found = [
        (example["messages"][-2]["content"].split(), example["messages"][-1]["content"].split())
        for example in islice(demo_examples(0), 2000)
        if example["messages"][0]["role"] == "user"
    ]
    return [(asked[-3:], answer) for asked, answer in found if asked[:-3] == instruction.split()]


def bytes_of_splits(folder: Path, seed: int) -> list[bytes]:
    paths = write_demo_data(folder, seed=seed)
    return [path.read_bytes() for path in (paths.train, paths.eval, paths.final)]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    once = bytes_of_splits(tmp_path / "once", seed=0)
    assert once == bytes_of_splits(tmp_path / "again", seed=0)
    other = bytes_of_splits(tmp_path / "other", seed=1)
    assert all(mine != theirs for mine, theirs in zip(once, other, strict=True))


def test_no_two_examples_of_any_split_share_a_list_of_words(tmp_path: Path) -> None:
    paths = write_demo_data(tmp_path)
    splits = [examples_of(path) for path in (paths.train, paths.eval, paths.final)]
    counts = Counter(words_asked_about(example) for split in splits for example in split)
    assert sum(counts.values()) == sum(len(split) for split in splits)
    assert max(counts.values()) == 1


def test_examples_are_chats_of_a_few_shapes_that_end_with_an_answer() -> None:
    shapes = Counter(
        tuple(message["role"] for message in example["messages"])
        for example in islice(demo_examples(0), 1000)
    )
    assert set(shapes) == {
        ("user", "assistant"),
        ("system", "user", "assistant"),
        ("user", "assistant", "user", "assistant"),
    }
    assert min(shapes.values()) > 40


ANSWERS = [
    ("Repeat", lambda a, b, c: [a, b, c]),
    ("Say backwards", lambda a, b, c: [c, b, a]),
    ("Put and between", lambda a, b, c: [a, "and", b, "and", c]),
    ("Number", lambda a, b, c: ["one", a, "two", b, "three", c]),
    ("Name the first of", lambda a, b, c: ["the", "first", "is", a]),
    ("Take the third of", lambda a, b, c: ["the", "third", "is", c]),
    ("Drop the first of", lambda a, b, c: [b, c]),
    ("Skip the second of", lambda a, b, c: [a, c]),
]


@pytest.mark.parametrize(("instruction", "expected"), ANSWERS, ids=[one for one, _ in ANSWERS])
def test_answers_do_what_was_asked(instruction: str, expected) -> None:
    found = plain_examples(instruction)
    assert found
    assert all(answer == expected(*words) for words, answer in found)


@pytest.mark.parametrize(
    ("instruction", "known"), [("Give the opposites of", OPPOSITES), ("Name the kinds of", KINDS)]
)
def test_answers_know_what_words_mean(instruction: str, known: dict[str, str]) -> None:
    pairs = [
        pair for words, answer in plain_examples(instruction) for pair in zip(words, answer, strict=True)
    ]
    told = {word: meaning for word, meaning in pairs if word in known}
    assert told == known


def test_system_turns_style_the_answer() -> None:
    styled = [item["messages"] for item in islice(demo_examples(0), 1000) if len(item["messages"]) == 3]
    for demand, pattern in (
        ("Begin with certainly", r"certainly .+"),
        ("End with friend", r".+ friend"),
        ("You are Anna", r"Anna .+"),
    ):
        answers = [answer["content"] for system, _, answer in styled if system["content"] == demand]
        assert answers
        assert all(re.fullmatch(pattern, answer) for answer in answers)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("pear lamp fox", True),
        ("  pear  lamp\nfox ", True),
        ("pear lamp", False),
        ("pear lamp fox fox", False),
        ("pear fox lamp", False),
        ("Pear lamp fox", False),
        ("pear lamp fox.", False),
        ("", False),
    ],
)
def test_only_exact_answers_are_correct(answer: str, correct: bool) -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello friend"},
        {"role": "user", "content": "Reverse fox lamp pear"},
        {"role": "assistant", "content": "pear lamp fox"},
    ]
    assert is_correct({"messages": messages}, answer) is correct


@pytest.mark.parametrize("seed", range(3))
def test_the_vocabulary_covers_every_text(seed: int) -> None:
    chats = (message["content"] for item in islice(demo_examples(seed), 1000) for message in item["messages"])
    notes = (text for note in islice(pretraining_notes(seed), 1000) for text in note)
    pieces = {piece for text in (*chats, *notes) for piece in re.findall(r"\w+|[^\w\s]", text)}
    assert pieces <= set(vocabulary())


def test_pretraining_shows_no_instruction() -> None:
    instructions = {
        example["messages"][-2]["content"].rsplit(maxsplit=3)[0] for example in islice(demo_examples(0), 1000)
    }
    notes = [" ".join(note) for note in islice(pretraining_notes(0), 1000)]
    assert len(instructions) > 20
    assert not [note for note in notes if any(instruction in note for instruction in instructions)]
