"""System prompts, tools, calls and results arrive, whatever they are called; nothing is dropped silently."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from autosft.profiles.dataset.formats import Conversation
from autosft.profiles.dataset.problems import BadRecord
from tests.profiles.dataset.reading import assistant, conversation, convert, gpt, human, user

TOOL = {
    "name": "count",
    "description": "counts",
    "parameters": {"type": "object", "properties": {"shelf": {}}},
}
LISTED = ({"type": "function", "function": TOOL},)


def _renamed(key: str) -> dict[str, Any]:
    return {key if name == "parameters" else name: value for name, value in TOOL.items()}


SYSTEM: list[dict[str, Any]] = [
    {"messages": [user(), assistant()], "system": "s"},
    {"conversations": [human(), gpt()], "system": "s"},
    {"messages": [user(), assistant()], "system_prompt": "s"},
    {"messages": [user(), assistant()], "system": "", "system_prompt": "s"},
    {"messages": [user(), assistant()], "systemPrompt": "s"},
    {"messages": [user(), assistant()], "system": [{"type": "text", "text": "s"}]},
    {"conversations": [human(), gpt()], "system": {"role": "system", "content": "s"}},
    {"messages": [user(), assistant()], "systemInstruction": {"parts": [{"text": "s"}]}},
    {"messages": [{"role": "system", "content": "s"}, user(), assistant()], "system": "s"},
    {"messages": [{"role": "system", "content": ""}, user(), assistant()], "system": "s"},
    {"prompt": [user()], "completion": [assistant()], "system": "s"},
    {"instruction": "a", "output": "b", "system_message": "s"},
]


@pytest.mark.parametrize("fields", SYSTEM, ids=str)
def test_a_system_prompt_in_its_own_column_comes_first(fields: dict[str, Any]) -> None:
    example = conversation(fields)

    said = [(message["role"], message["content"]) for message in example.messages]
    assert said == [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert example.learned == (2,)


TOOLS: list[tuple[str, dict[str, Any]]] = [
    ("OpenAI", {"tools": list(LISTED)}),
    ("functions alone", {"tools": [TOOL]}),
    ("JSON", {"tools": json.dumps([TOOL])}),
    ("each in JSON", {"tools": [json.dumps(TOOL)]}),
    ("OpenAI's older column", {"functions": [TOOL]}),
    ("the older column in JSON", {"functions": json.dumps([TOOL])}),
    ("both alike", {"tools": [TOOL], "functions": [TOOL]}),
    ("Responses API", {"tools": [{"type": "function", **TOOL}]}),
    ("one, not in a list", {"tools": TOOL}),
    ("empty and older", {"tools": [], "functions": [TOOL]}),
    ("null and older", {"tools": None, "functions": [TOOL]}),
    ("by name", {"tools": {"count": {key: TOOL[key] for key in ("description", "parameters")}}}),
    ("Anthropic's", {"tools": [_renamed("input_schema")]}),
    ("Model Context Protocol's", {"tools": json.dumps([_renamed("inputSchema")])}),
    ("Gemini's", {"tools": [{"function_declarations": [TOOL]}]}),
    ("another name", {"available_tools": [TOOL]}),
    ("tool definitions", {"tool_definitions": json.dumps([TOOL])}),
    ("Gemini's JSON", {"tools": json.dumps({"functionDeclarations": [TOOL]})}),
]


@pytest.mark.parametrize(("case", "columns"), TOOLS, ids=[case for case, _ in TOOLS])
def test_tools_are_listed_in_the_prompt_in_every_form(case: str, columns: dict[str, Any]) -> None:
    for turns in ({"messages": [user(), assistant()]}, {"conversations": [human(), gpt()]}):
        assert conversation({**turns, **columns}).tools == LISTED, case


def test_tools_in_the_system_turn_are_listed() -> None:
    system = {"role": "system", "content": "s", "tools": [TOOL]}

    assert conversation({"messages": [system, user(), assistant()]}).tools == LISTED


def test_tools_that_the_system_turn_lists_in_text_are_not_listed_again() -> None:
    listed = f"You call functions. <tools>{json.dumps(TOOL)}</tools>"
    for system, tools in ((listed, ()), ("You call functions: count.", LISTED)):
        turns = [{"from": "system", "value": system}, human(), gpt()]
        example = conversation({"conversations": turns, "tools": json.dumps([TOOL])})

        assert example.tools == tools
        assert any("not listed again" in said for said in example.found) is not bool(tools)


CALL = {"name": "count", "arguments": {"shelf": 3}}


def _beside(key: str, inside: dict[str, Any]) -> dict[str, Any]:
    return {"id": "c1", "function": {"name": "count", **inside}, key: {"shelf": 3}}


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("OpenAI", assistant("", tool_calls=[{"id": "c1", "type": "function", "function": CALL}])),
    ("arguments as text", assistant("", tool_calls=[{"function": {**CALL, "arguments": '{"shelf": 3}'}}])),
    ("arguments as text of text", assistant("", tool_calls=[{**CALL, "arguments": '"{\\"shelf\\": 3}"'}])),
    ("bare", assistant(None, tool_calls=[CALL])),
    ("the list as JSON", assistant(None, tool_calls=json.dumps([CALL]))),
    ("one call, no list", assistant(None, tool_calls={"function": CALL})),
    ("each as JSON", assistant(None, tool_calls=[json.dumps(CALL)])),
    ("the function as JSON", assistant(None, tool_calls=[{"function": json.dumps(CALL)}])),
    ("name under function", assistant(None, tool_calls=[{"function": "count", "arguments": {"shelf": 3}}])),
    ("null function", assistant(None, tool_calls=[{"function": None, **CALL}])),
    ("function_call", assistant(None, function_call=CALL)),
    ("function_call as JSON", assistant(None, function_call=json.dumps(CALL))),
    ("parameters", assistant("", tool_calls=[{"name": "count", "parameters": {"shelf": 3}}])),
    ("parameters as text", assistant("", function_call={"name": "count", "parameters": '{"shelf": 3}'})),
    ("args", assistant("", tool_calls=[{"name": "count", "args": {"shelf": 3}}])),
    ("input", assistant("", tool_calls=[{"name": "count", "input": {"shelf": 3}}])),
    ("ShareGPT", {"from": "function_call", "value": json.dumps(CALL)}),
    ("ShareGPT, list", {"from": "function_call", "value": json.dumps([CALL])}),
    (
        "ShareGPT, parameters",
        {"from": "function_call", "value": '{"name": "count", "parameters": {"shelf": 3}}'},
    ),
    ("ShareGPT, an object", {"from": "function_call", "value": CALL}),
    ("ms-swift", {"role": "tool_call", "content": json.dumps(CALL)}),
    ("glaive", {"from": "function-call", "value": json.dumps(CALL)}),
    ("ShareGPT with OpenAI's calls", gpt("", tool_calls=[CALL])),
    ("arguments beside the function", assistant("", tool_calls=[_beside("arguments", {})])),
    ("parameters beside the function", assistant("", tool_calls=[_beside("parameters", {})])),
    ("beside empty ones", assistant("", tool_calls=[_beside("arguments", {"arguments": "{}"})])),
    ("tool_call", assistant(None, tool_call=CALL)),
    ("function_calls", assistant("", function_calls=[CALL])),
]


@pytest.mark.parametrize(("case", "turn"), CALLS, ids=[case for case, _ in CALLS])
def test_a_call_keeps_its_arguments_in_every_form(case: str, turn: dict[str, Any]) -> None:
    example = conversation({"messages": [user(), turn, {"role": "tool", "content": "7"}, assistant()]})

    (call,) = example.messages[1]["tool_calls"]
    assert call["function"] == CALL, case
    assert example.learned == (1, 3)
    assert example.messages[2]["tool_call_id"] == call["id"]


NO_ARGUMENTS: list[dict[str, Any]] = [
    {"name": "now"},
    {"name": "now", "arguments": None},
    {"name": "now", "arguments": {}},
    {"name": "now", "arguments": ""},
    {"name": "now", "arguments": "{}"},
    {"name": "now", "parameters": {}},
]


@pytest.mark.parametrize("call", NO_ARGUMENTS, ids=str)
def test_a_call_without_arguments_has_none(call: dict[str, Any]) -> None:
    example = conversation({"messages": [user(), assistant("", tool_calls=[call])]})

    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


REFUSED_CALLS: list[tuple[str, Any, str]] = [
    ("arguments under an unknown key", {"name": "count", "params": {"shelf": 3}}, "params in their place"),
    ("two sets", {"name": "f", "arguments": {}, "parameters": {"a": 1}}, "two sets of arguments"),
    ("empty, and others beside", {"name": "f", "arguments": {}, "shelf": 3}, "shelf beside them"),
    ("no name", {"arguments": {"shelf": 3}}, "not JSON with name"),
    ("a list of arguments", {"name": "f", "arguments": [3]}, "not a JSON object"),
    ("arguments that are no JSON", {"name": "f", "arguments": "shelf=3"}, "not a JSON object"),
    ("code", "count(shelf=3)", "not JSON with name"),
]


@pytest.mark.parametrize(("case", "call", "says"), REFUSED_CALLS, ids=[case for case, *_ in REFUSED_CALLS])
def test_a_call_that_cannot_be_told_is_refused(case: str, call: Any, says: str) -> None:
    problem = convert({"messages": [user(), assistant("", tool_calls=[call])]})

    assert isinstance(problem, BadRecord), case
    assert says in f"{problem.reason} {problem.detail}"


def test_several_calls_a_turn_each_are_one_turn() -> None:
    calls = [
        {"role": "tool_call", "content": json.dumps({**CALL, "arguments": {"shelf": n}})} for n in (1, 2)
    ]
    results = [{"role": "tool_response", "content": str(n)} for n in (10, 20)]
    example = conversation({"messages": [user(), *calls, *results, assistant()]})

    assert [message["role"] for message in example.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    made = example.messages[1]["tool_calls"]
    assert [call["function"]["arguments"]["shelf"] for call in made] == [1, 2]
    assert [message["tool_call_id"] for message in example.messages[2:4]] == [call["id"] for call in made]


RESULTS: list[tuple[str, dict[str, Any], str]] = [
    ("OpenAI", {"role": "tool", "content": "7"}, "7"),
    ("older", {"role": "function", "name": "count", "content": "7"}, "7"),
    ("ShareGPT", {"from": "observation", "value": "7"}, "7"),
    ("Hermes", {"from": "tool", "value": "7"}, "7"),
    ("Llama 3.1", {"role": "ipython", "content": "7"}, "7"),
    ("a result by name", {"role": "tool_result", "content": "7"}, "7"),
    ("an object", {"role": "tool", "content": {"count": 7}}, '{"count": 7}'),
    ("a number", {"role": "tool", "content": 7}, "7"),
    ("a list", {"role": "tool", "content": [{"count": 7}]}, '[{"count": 7}]'),
    ("parts", {"role": "tool", "content": [{"type": "text", "text": "7"}]}, "7"),
]


@pytest.mark.parametrize(("case", "turn", "content"), RESULTS, ids=[case for case, *_ in RESULTS])
def test_a_result_arrives_in_every_form(case: str, turn: dict[str, Any], content: str) -> None:
    example = conversation({"messages": [user(), assistant("", tool_calls=[CALL]), turn, assistant()]})

    assert example.messages[2]["role"] == "tool", case
    assert example.messages[2]["content"] == content


IN_TEXT = {
    "Hermes": '<tool_call>\n{"name": "count", "arguments": {"shelf": 3}}\n</tool_call>',
    "ToolACE": "[count(shelf=3)]",
    "Llama 3.2": '<|python_tag|>{"name": "count", "parameters": {"shelf": 3}}',
}


@pytest.mark.parametrize("text", IN_TEXT.values(), ids=IN_TEXT)
def test_a_tool_turn_may_follow_a_call_in_the_text(text: str) -> None:
    turns = [human(), gpt(text), {"from": "tool", "value": "7"}, {"from": "tool", "value": "8"}, gpt()]
    example = conversation({"conversations": turns, "system": "tools: count"})

    assert example.messages[2]["content"] == text
    assert [message["role"] for message in example.messages[3:]] == ["tool", "tool", "assistant"]
    assert example.learned == (2, 5)


@dataclass(frozen=True, kw_only=True)
class Refused:
    case: str
    fields: dict[str, Any]
    says: str


REFUSED = [
    Refused(
        case="two system prompts",
        fields={"messages": [{"role": "system", "content": "x"}, user(), assistant()], "system": "s"},
        says="two system prompts",
    ),
    Refused(
        case="two system columns",
        fields={"messages": [user(), assistant()], "system": "s", "system_prompt": "t"},
        says="two system prompts",
    ),
    Refused(
        case="two lists of tools",
        fields={"messages": [user(), assistant()], "tools": [TOOL], "functions": [{**TOOL, "name": "x"}]},
        says="two lists of tools",
    ),
    Refused(
        case="a system prompt beside plain text",
        fields={"prompt": "a", "completion": "b", "system": "s"},
        says="no place for system",
    ),
    Refused(
        case="tools beside plain text",
        fields={"prompt": "a", "completion": "b", "tools": [TOOL]},
        says="tools",
    ),
    Refused(
        case="a tool without a name",
        fields={"messages": [user(), assistant()], "tools": [{"description": "counts"}]},
        says="a tool without a name",
    ),
    Refused(
        case="a picture",
        fields={"messages": [user("<image>What is it?"), assistant()], "images": ["a.png"]},
        says="turn 1 has <image> for what the column images holds",
    ),
    Refused(
        case="no role",
        fields={"messages": [{"speaker": "user", "content": "a"}, assistant()]},
        says="turn 1: its keys are speaker, content",
    ),
    Refused(
        case="no content",
        fields={"messages": [user(), {"role": "assistant", "text": "b"}]},
        says="no content",
    ),
    Refused(
        case="content and value differ", fields={"messages": [user(value="x"), assistant()]}, says="differ"
    ),
    Refused(
        case="role and from differ",
        fields={"messages": [{"role": "user", "from": "gpt", "content": "a"}, assistant()]},
        says="differ",
    ),
    Refused(
        case="a result after a question",
        fields={"messages": [user(), {"role": "tool", "content": "7"}, assistant()]},
        says="a tool result without a call",
    ),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.case)
def test_what_would_be_lost_is_refused(refused: Refused) -> None:
    problem = convert(refused.fields)

    assert isinstance(problem, BadRecord)
    assert refused.says in f"{problem.reason} {problem.detail}"


SPELLINGS: list[list[dict[str, Any]]] = [
    [user(), assistant()],
    [human(), gpt()],
    [{"role": "user", "value": "a"}, {"role": "assistant", "value": "b"}],
    [{"from": "user", "content": "a"}, {"from": "assistant", "content": "b"}],
    [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}],
    [{"role": "User", "content": "a"}, {"role": "ASSISTANT", "content": "b"}],
    [{"from": "Human:", "value": "a"}, {"from": "AI", "value": "b"}],
    [{"role": "user", "content": [{"text": "a"}]}, {"role": "bot", "content": "b"}],
    [{"role": "prompter", "content": "a"}, {"role": "Chatbot", "content": "b"}],
    [{"human": "a", "assistant": "b"}],
    [{"user": "a"}, {"assistant": "b"}],
    [{"system": "", "input": "a", "output": "b"}],
    [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
    ],
    [{"role": "user", "from": "human", "content": "a", "value": "a"}, assistant()],
]


@pytest.mark.parametrize("turns", SPELLINGS, ids=str)
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_turns_are_read_in_every_spelling(column: str, turns: list[dict[str, Any]]) -> None:
    for given in (turns, json.dumps(turns), list(map(json.dumps, turns))):
        example = conversation({column: given})
        assert [message["content"] for message in example.messages] == ["a", "b"]


PAIRS: list[dict[str, Any]] = [
    {"prompt": [user()], "completion": "b"},
    {"prompt": "a", "completion": [assistant()]},
]


@pytest.mark.parametrize("fields", PAIRS, ids=str)
def test_text_beside_turns_is_a_turn(fields: dict[str, Any]) -> None:
    assert conversation(fields).messages == (user(), assistant())


NUMBERS: list[dict[str, Any]] = [
    {"instruction": 6, "output": 0},
    {"instruction": "", "input": 6, "output": 0},
    {"messages": [user(6), assistant(0)]},
]


@pytest.mark.parametrize("fields", NUMBERS, ids=str)
def test_whole_numbers_are_their_digits(fields: dict[str, Any]) -> None:
    assert [message["content"] for message in conversation(fields).messages] == ["6", "0"]


def test_a_struct_of_lists_is_a_list_of_turns() -> None:
    example = conversation({"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}})

    assert isinstance(example, Conversation)
    assert example.messages == (user(), assistant())


def test_an_empty_column_of_turns_is_none() -> None:
    """Tables that are put together from several have empty lists where another has the turns."""
    spoken = {"messages": [], "conversations": [human(), gpt()]}
    pair = {"messages": [], "prompt": [user()], "completion": [assistant()]}

    for fields in (spoken, pair):
        assert conversation(fields).messages == (user(), assistant())


def test_keys_that_are_not_used_are_said() -> None:
    example = conversation({"messages": [user(mood="good"), assistant(mood=None)]})

    assert example.found == {"turns have the key 'mood', which is not used"}
