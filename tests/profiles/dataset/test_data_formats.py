"""Formats: recognised by their columns, made into one form, and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from autosft.profiles.dataset.convert import LeftOut, to_example
from autosft.profiles.dataset.formats import (
    Completion,
    Conversation,
    DataFormat,
    Example,
    Passage,
    recognise,
)
from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.dataset.record import Record


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def convert(fields: dict[str, Any], max_rounds: int | None = None) -> Example | BadRecord | LeftOut:
    record = Record(where="data.jsonl line 7", fields=fields)
    data_format = recognise(record)
    assert data_format is not None
    return to_example(record, data_format, max_rounds)


def turns(fields: dict[str, Any], max_rounds: int | None = None) -> list[tuple[str, str]]:
    example = convert(fields, max_rounds)
    assert isinstance(example, Conversation), example
    return [(message["role"], message["content"]) for message in example.messages]


CALL = {"name": "f", "arguments": {"x": 1}}
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": [user("a"), assistant("b")]}, DataFormat.MESSAGES),
        ({"conversations": [user("a"), assistant("b")]}, DataFormat.MESSAGES),
        ({"messages": json.dumps([user("a"), assistant("b")])}, DataFormat.MESSAGES),
        ({"conversations": [{"from": "human", "value": "a"}]}, DataFormat.SHAREGPT),
        ({"instruction": "a", "input": "", "output": "b"}, DataFormat.ALPACA),
        ({"prompt": "a", "completion": "b"}, DataFormat.PROMPT_COMPLETION),
        ({"text": "a", "id": 1}, DataFormat.TEXT),
        ({"question": "a", "answer": "b"}, None),
        ({}, None),
    ],
)
def test_recognised_by_columns(fields: dict[str, Any], expected: DataFormat | None) -> None:
    assert recognise(Record(where="x", fields=fields)) is expected


def test_openai_messages_with_tools() -> None:
    called = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    example = convert(
        {
            "messages": [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "s1"}, {"type": "text", "text": "s2"}],
                },
                user("a"),
                {"role": "assistant", "content": None, "tool_calls": [called]},
                {"role": "tool", "tool_call_id": "c1", "content": "42"},
                assistant("b"),
                user("left over"),
            ],
            "tools": [{"type": "function", "function": TOOL}],
        }
    )

    assert isinstance(example, Conversation)
    assert [message["role"] for message in example.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert example.messages[0]["content"] == "s1s2"
    assert example.messages[2]["tool_calls"] == [{"id": "c1", "type": "function", "function": CALL}]
    assert example.tools == ({"type": "function", "function": TOOL},)
    assert example.learned == (2, 4)
    assert example.where == "data.jsonl line 7"


def test_sharegpt_with_calls_and_tools_column() -> None:
    example = convert(
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "42"},
                {"from": "gpt", "value": "b"},
            ],
            "tools": json.dumps([TOOL]),
        }
    )

    assert isinstance(example, Conversation)
    assert [message["role"] for message in example.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    (call,) = example.messages[2]["tool_calls"]
    assert call["function"] == CALL
    assert example.messages[3]["tool_call_id"] == call["id"]
    assert example.tools == ({"type": "function", "function": TOOL},)


def test_alpaca_with_history() -> None:
    fields = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["h1", "h2"]]}

    assert turns(fields) == [
        ("system", "s"),
        ("user", "h1"),
        ("assistant", "h2"),
        ("user", "i\nx"),
        ("assistant", "o"),
    ]
    assert turns({"instruction": "i", "input": "", "output": "o"}) == [("user", "i"), ("assistant", "o")]


def test_prompt_and_completion() -> None:
    text = convert({"prompt": "[1, 2] sorted:", "completion": "[1, 2]"})
    talk = convert({"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]})

    assert text == Completion(where="data.jsonl line 7", prompt="[1, 2] sorted:", completion="[1, 2]")
    assert isinstance(talk, Conversation)
    assert talk.learned == (3,)


def test_text() -> None:
    assert convert({"text": "once"}) == Passage(where="data.jsonl line 7", text="once")


def test_answers_of_weight_zero_are_not_learned() -> None:
    example = convert({"messages": [user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d")]})

    assert isinstance(example, Conversation)
    assert example.learned == (3,)


@pytest.mark.parametrize(
    ("max_rounds", "kept"),
    [(1, "sua"), (2, "suaua"), (3, "suauauua"), (9, "suauauua")],
)
def test_rounds_are_cut_after_an_answer_and_the_system_turn_stays(max_rounds: int, kept: str) -> None:
    """The third round has two user turns; what follows the last answer has none."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": roles[letter], "content": letter} for letter in "suauauuau"]

    assert "".join(content for _, content in turns({"messages": messages}, max_rounds)) == kept


def test_a_round_ends_with_its_last_answer() -> None:
    messages = [
        user("a"),
        {"role": "assistant", "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "42"},
        assistant("b"),
        user("c"),
        assistant("d"),
    ]

    assert [role for role, _ in turns({"messages": messages}, 1)] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


@dataclass(frozen=True, kw_only=True)
class Bad:
    case: str
    fields: dict[str, Any]
    reason: str
    detail: str = ""


def says(*pairs: str) -> list[dict[str, str]]:
    return [{"from": pair.split(":")[0], "value": pair.split(":")[1]} for pair in pairs]


BAD = [
    Bad(case="no answer", fields={"messages": [user("a")]}, reason="no assistant turn"),
    Bad(case="no turns", fields={"messages": []}, reason="no assistant turn"),
    Bad(case="no answer, ShareGPT", fields={"conversations": says("human:a")}, reason="no assistant turn"),
    Bad(case="empty answer", fields={"messages": [user("a"), assistant(" ")]}, reason="empty answer"),
    Bad(case="empty output", fields={"instruction": "a", "output": ""}, reason="empty answer"),
    Bad(case="null output", fields={"instruction": "a", "output": None}, reason="empty answer"),
    Bad(case="empty completion", fields={"prompt": "a", "completion": "\n"}, reason="empty answer"),
    Bad(case="empty question", fields={"messages": [user(""), assistant("b")]}, reason="empty content"),
    Bad(case="empty instruction", fields={"instruction": "", "output": "b"}, reason="empty content"),
    Bad(case="empty text", fields={"text": " \n"}, reason="empty content"),
    Bad(
        case="unknown role",
        fields={"messages": [{"role": "narrator", "content": "a"}]},
        reason="unknown role",
        detail="'narrator', known are system, developer, user",
    ),
    Bad(
        case="unknown speaker",
        fields={"conversations": says("human:a", "alien:b")},
        reason="unknown role",
        detail="'alien', known are system, developer, user, human",
    ),
    Bad(case="role is no text", fields={"messages": [{"role": 3}]}, reason="unknown role"),
    Bad(
        case="answer first", fields={"messages": [assistant("a"), user("b"), assistant("c")]}, reason="starts"
    ),
    Bad(
        case="result without call",
        fields={"messages": [user("a"), {"role": "tool", "content": "b"}, assistant("c")]},
        reason="a tool result without a call",
    ),
    Bad(
        case="call is no JSON",
        fields={"conversations": says("human:a", "function_call:f(x)")},
        reason="a function call is not JSON",
    ),
    Bad(
        case="arguments are no object",
        fields={
            "messages": [
                user("a"),
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x = 1"}}]},
            ]
        },
        reason="a function call's arguments are not a JSON object",
    ),
    Bad(
        case="tools are no list",
        fields={"conversations": says("human:a", "gpt:b"), "tools": "f(x)"},
        reason="tools are not a JSON list",
    ),
    Bad(case="messages are no list", fields={"messages": "hello"}, reason="messages is not a list"),
    Bad(case="turn is no object", fields={"messages": [user("a"), "b"]}, reason="a turn is not an object"),
    Bad(case="number", fields={"text": 5.5}, reason="content that is not text"),
    Bad(
        case="image",
        fields={"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("b")]},
        reason="content that is not text",
        detail="'image_url'",
    ),
    Bad(case="half a character", fields={"text": "a\ud800"}, reason="not valid Unicode"),
    Bad(
        case="history",
        fields={"instruction": "a", "output": "b", "history": [["x"]]},
        reason="history is not a list",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.case)
def test_bad_records_say_what_is_wrong_and_where(bad: Bad) -> None:
    problem = convert(bad.fields)

    assert isinstance(problem, BadRecord)
    assert problem.where == "data.jsonl line 7"
    assert problem.reason.startswith(bad.reason)
    assert bad.detail in problem.detail
