"""Turns and records that say of themselves that they are not to be learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autosft.profiles.dataset import Split, describe, prepare
from autosft.profiles.dataset.convert import LeftOut
from autosft.profiles.dataset.formats import Conversation
from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.sources import open_source
from tests.profiles.dataset.prepared_data import Write, jsonl, rows
from tests.profiles.dataset.reading import assistant, conversation, convert, gpt, human, user

MARKS: list[tuple[str, object, bool]] = [
    ("weight", 0, False),
    ("weight", 0.0, False),
    ("weight", 1, True),
    ("weight", 1.0, True),
    ("weight", "0", False),
    ("weight", None, True),
    ("weight", False, False),
    ("train", False, False),
    ("train", True, True),
    ("train", "false", False),
    ("train", "True", True),
    ("train", 0, False),
    ("training", False, False),
    ("trainable", False, False),
    ("learn", "no", False),
    ("loss", False, False),
    ("loss", True, True),
    ("loss_weight", 0.0, False),
    ("loss_mask", 0, False),
    ("loss_scale", 0, False),
    ("is_trained", False, False),
    ("should_train", "false", False),
    ("compute_loss", 0, False),
    ("Train-On-Turn", False, False),
    ("supervised", True, True),
    ("ignore", True, False),
    ("ignore", False, True),
    ("no_loss", 1, False),
    ("Skip", "no", True),
    ("train_detail", [], True),
    ("train_detail", None, True),
    ("mask", None, True),
]


@pytest.mark.parametrize(("key", "value", "is_learned"), MARKS)
def test_marks_decide_in_every_format_whether_a_turn_is_trained_on(
    key: str, value: object, is_learned: bool
) -> None:
    mark = {key: value}
    last = [user("c"), assistant("d")]
    spoken = [
        {"messages": [user(), assistant(**mark), *last]},
        {"conversations": [human(), gpt(**mark), human("c"), gpt("d")]},
        {"conversations": [human(), gpt(**mark), *last]},
        {"prompt": [user()], "completion": [assistant(**mark), *last]},
        {"messages": [user(), assistant([{"type": "text", "text": "b", **mark}]), *last]}
        if key not in ("train_detail", "mask")
        else {"messages": [user(), assistant(**mark), *last]},
    ]
    for fields in spoken:
        example = conversation(fields)
        assert example.learned == ((1, 3) if is_learned else (3,)), fields
        assert any("not to be learned" in said for said in example.found) is not is_learned


LISTED: list[tuple[str, Any, tuple[int, ...]]] = [
    ("loss_mask", [0, 0, 0, 1], (3,)),
    ("weight", [0.0, 1.0, 0.0, 0.0], (1,)),
    ("train", [True, False], (1,)),
    ("weights", "[0, 1]", (3,)),
    ("loss", [None, None, None, False], (1,)),
]


@pytest.mark.parametrize(("key", "marks", "learned"), LISTED)
def test_a_column_may_list_the_marks_of_all_turns_or_of_all_answers(
    key: str, marks: Any, learned: tuple[int, ...]
) -> None:
    for turns in (
        {"messages": [user(), assistant(), user("c"), assistant("d")]},
        {"conversations": [human(), gpt(), human("c"), gpt("d")]},
    ):
        assert conversation({**turns, key: marks}).learned == learned


@pytest.mark.parametrize(
    ("key", "marks", "says"),
    [("train", [1, 0, 1], "there are 4 turns, 2 of them answers"), ("mask", [0, 1, 0, 1], "mask 1")],
)
def test_listed_marks_that_cannot_be_followed_are_refused(key: str, marks: list[int], says: str) -> None:
    problem = convert({"messages": [user(), assistant(), user("c"), assistant("d")], key: marks})

    assert isinstance(problem, BadRecord)
    assert says in problem.detail


@dataclass(frozen=True, kw_only=True)
class Refused:
    case: str
    turns: list[dict[str, Any]]
    says: str


REFUSED = [
    Refused(case="half", turns=[user(), assistant(weight=0.5)], says="turn 2: weight is 0.5"),
    Refused(case="two", turns=[user(), assistant(weight=2)], says="turn 2: weight is 2"),
    Refused(case="below zero", turns=[user(), assistant(weight=-1)], says="turn 2: weight is -1"),
    Refused(case="a word", turns=[user(), assistant(train="some")], says="turn 2: train is 'some'"),
    Refused(case="not a number", turns=[user(), assistant(loss=float("nan"))], says="turn 2: loss is nan"),
    Refused(case="a list", turns=[user(), assistant(loss=[1, 0])], says="turn 2: loss is [1, 0]"),
    Refused(case="ShareGPT", turns=[human(), gpt(weight=0.5)], says="turn 2: weight is 0.5"),
    Refused(case="of a question", turns=[user(weight=0.5), assistant()], says="turn 1: weight is 0.5"),
    Refused(case="either way", turns=[user(), assistant(mask=1)], says="turn 2: mask 1"),
    Refused(
        case="a part, by characters",
        turns=[user(), assistant(train_detail=[{"begin_offset": 0, "end_offset": 0, "train": False}])],
        says="turn 2: train_detail",
    ),
    Refused(
        case="a part, by parts",
        turns=[
            user(),
            assistant([{"type": "text", "text": "x", "train": False}, {"type": "text", "text": "y"}]),
        ],
        says="turn 2",
    ),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.case)
def test_what_cannot_be_followed_is_refused_with_its_place(refused: Refused) -> None:
    problem = convert({"conversations" if "from" in refused.turns[0] else "messages": refused.turns})

    assert isinstance(problem, BadRecord)
    assert problem.where == "data.jsonl line 7"
    assert refused.says in problem.detail


def test_only_answers_are_learned_whatever_other_turns_say() -> None:
    example = conversation({"conversations": [human(train=True), gpt(train=True)]})

    assert example.learned == (1,)
    assert any("no answers are marked to be learned" in said for said in example.found)


LEFT_OUT: list[tuple[str, dict[str, Any]]] = [
    ("weight", {"instruction": "a", "output": "b", "weight": 0}),
    ("weight in a table", {"instruction": "a", "output": "b", "weight": "0"}),
    ("train", {"messages": [user(), assistant()], "train": False}),
    ("split", {"prompt": "a", "completion": "b", "split": "test"}),
    ("split, in part of a word", {"prompt": "a", "completion": "b", "split": "validation_3"}),
    ("KTO of trl", {"prompt": "a", "completion": "b", "label": False}),
    ("KTO of LLaMA-Factory", {"conversations": [human(), gpt()], "kto_tag": False}),
    ("text", {"text": "a", "split": "dev"}),
    ("partition", {"instruction": "a", "output": "b", "partition": "test"}),
    ("data_split", {"messages": [user(), assistant()], "data_split": "Validation"}),
    ("Split", {"text": "a", "Split": "TEST"}),
    ("is_train", {"messages": [user(), assistant()], "is_train": False}),
    ("use for training", {"instruction": "a", "output": "b", "use_in_training": "false"}),
    ("ignore", {"conversations": [human(), gpt()], "ignore": True}),
    ("skip in a table", {"prompt": "a", "completion": "b", "Skip": "True"}),
    ("exclude", {"messages": [user(), assistant()], "exclude": True}),
    ("is_test", {"messages": [user(), assistant()], "is_test": True}),
    ("is_validation in a table", {"prompt": "a", "completion": "b", "is_validation": "True"}),
    ("in_test_set", {"text": "a", "in_test_set": 1}),
]


@pytest.mark.parametrize(("case", "fields"), LEFT_OUT, ids=[case for case, _ in LEFT_OUT])
def test_a_marked_record_is_left_out(case: str, fields: dict[str, Any]) -> None:
    example = convert(fields)

    assert isinstance(example, LeftOut)
    assert example.why.startswith(f"their column {list(fields)[-1]} says "), case


KEPT: list[dict[str, Any]] = [
    {"instruction": "a", "output": "b", "weight": 1},
    {"instruction": "a", "output": "b", "weight": 72.5},  # of an animal, say
    {"instruction": "a", "output": "b", "train": "ICE 73"},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "completion": "b", "label": 0},
    {"text": "a", "label": False},  # of a classifier
    {"prompt": "a", "completion": "b", "split": "train"},
    {"prompt": "a", "completion": "b", "split": "hairs"},
    {"prompt": "a", "completion": "b", "subset": "math test prep"},
    {"prompt": "a", "completion": "b", "set": 3},
    {"messages": [user(), assistant()], "is_train": True},
    {"messages": [user(), assistant()], "ignore": False, "is_test": False},
    {"messages": [user(), assistant()], "loss": 0.0},  # measured
    {"messages": [user(), assistant()], "train_loss": 2.5, "skip": 3},
    {"messages": [user(), assistant()], "train_on_inputs": False, "mask_history": None},
    {"prompt": "a", "completion": "b", "train_input": "Monday's", "loss_answers": ["none"]},
    {"text": "a", "ignore": True},
]

CHOSEN: list[tuple[str, Any]] = [
    ("trainable_turns", [3]),
    ("train_on_last_only", True),
    ("mask_history", True),
    ("train_on_inputs", True),
    ("loss_on_last_turn", "true"),
    ("learn-indices", "[1]"),
    ("mask_prompt", 1),
]


@pytest.mark.parametrize(("name", "value"), CHOSEN)
def test_columns_that_choose_turns_in_their_own_way_are_refused(name: str, value: Any) -> None:
    problem = convert({"messages": [user(), assistant(), user("c"), assistant("d")], name: value})

    assert isinstance(problem, BadRecord)
    assert problem.reason == "a column says what is learned in a way that cannot be followed"
    assert name in problem.detail


WITHIN: list[tuple[dict[str, Any], bool]] = [
    ({"metadata": {"train": False}}, False),
    ({"extra": {"weight": 0}}, False),
    ({"extra": {"ignore": True}}, False),
    ({"meta": {"is_trained": 0, "source": "x"}}, False),
    ({"metadata": {"train": True, "skip": False}}, True),
    ({"metadata": {"weight": 72.5, "loss": 1.3, "train": None}}, True),
    ({"metadata": {"mood": False}}, True),
]


@pytest.mark.parametrize(("more", "is_learned"), WITHIN, ids=str)
def test_marks_within_an_object_of_a_turn_count(more: dict[str, Any], is_learned: bool) -> None:
    example = conversation({"messages": [user(), assistant(**more), user("c"), assistant("d")]})

    assert example.learned == ((1, 3) if is_learned else (3,))
    assert any("not to be learned" in said for said in example.found) is not is_learned


def test_what_pandas_writes_for_a_missing_mark_is_none(write: Write) -> None:
    turns = [
        {"role": "user", "content": "a", "weight": float("nan")},
        {"role": "assistant", "content": "b", "weight": 0.0},
        {"role": "user", "content": "c", "weight": float("nan")},
        {"role": "assistant", "content": "d", "weight": float("nan")},
    ]
    path = write("a.parquet", b"")
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "is_train": True}]), path)
    (record,) = open_source(path).records()

    assert isinstance(record, Record)
    assert conversation(dict(record.fields), fills_nulls=True).learned == (3,)
    assert record.fields["is_train"] is True  # such columns are read


UNKNOWN_MARKS = ({"loss_on": False}, {"mask_this": True}, {"train_tokens": [1, 2]})


@pytest.mark.parametrize("mark", UNKNOWN_MARKS, ids=str)
def test_keys_that_speak_of_it_and_are_not_known_are_refused(mark: dict[str, Any]) -> None:
    problem = convert({"messages": [user(), assistant(**mark)]})

    assert isinstance(problem, BadRecord)
    assert next(iter(mark)) in problem.detail


@pytest.mark.parametrize("fields", KEPT, ids=str)
def test_columns_that_only_look_like_it_leave_nothing_out(fields: dict[str, Any]) -> None:
    assert not isinstance(convert(fields), LeftOut | BadRecord)


def test_a_weight_in_between_on_a_record_is_refused() -> None:
    problem = convert({"instruction": "a", "output": "b", "weight": 0.5})

    assert isinstance(problem, BadRecord)
    assert "its weight is 0.5" in problem.detail


def test_pairs_for_preference_training_are_refused() -> None:
    turns = [human(), gpt(), human("c")]
    problem = convert({"conversations": turns, "chosen": gpt("x"), "rejected": gpt("y")})

    assert isinstance(problem, BadRecord)
    assert "preference" in problem.detail


def test_the_tokens_of_a_masked_turn_are_not_scored_and_it_is_reported(
    write: Write, chat_model: str, cache: Any
) -> None:
    records = [
        {"conversations": [human(f"q{n}"), gpt("Rude!", weight=0), human("again"), gpt(f"kind {n}")]}
        for n in range(40)
    ]
    left_out = {"conversations": [human("left"), gpt("out")], "train": False}
    prepared = prepare(write("a.jsonl", jsonl([*records, left_out])), model=chat_model, cache_dir=cache)

    scored = "".join(text for sample in prepared.samples for text, is_scored in sample if is_scored)
    read = "".join(text for sample in prepared.samples for text, is_scored in sample if not is_scored)
    assert "kind" in scored
    assert "Rude!" not in scored
    assert "Rude!" in read
    assert sum(len(rows(prepared, split)) for split in Split) == 40
    said = "\n".join(describe(prepared))
    assert "40 records: answers are marked as not to be learned (by weight)" in said
    assert "1 record left out: their column train says" in said


def test_a_conversation_keeps_its_turns_that_are_not_learned() -> None:
    example = conversation({"messages": [user(), assistant(weight=0), user("c"), assistant("d")]})

    assert isinstance(example, Conversation)
    assert [message["content"] for message in example.messages] == ["a", "b", "c", "d"]
    assert all("weight" not in message for message in example.messages)
