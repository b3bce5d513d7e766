"""Convert the turns of a conversation from various formats to OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autosft.profiles.dataset.json_values import parsed
from autosft.profiles.dataset.marks import FLAGS, FLAGS_AGAINST, UNCLEAR, is_turn_learned, marks_of
from autosft.profiles.dataset.problems import BadRecordError, brief, brief_list
from autosft.profiles.dataset.text_values import list_in, text_of, text_of_parts
from autosft.profiles.dataset.tool_calls import Tools, read_calls, with_call_ids, without_fills

Message = Mapping[str, Any]  # in OpenAI's terms: role, content, tool_calls, ...

KEYS_NOT_USED = "turns have the key {}, which is not used"


@dataclass(slots=True, kw_only=True)
class ReadTurns:
    """The turns of one record."""

    messages: tuple[Message, ...]
    learned: tuple[int, ...]  # positions of the answers that are learned
    tools: object = None  # as given in the system turn


def read_turns(turns: Sequence[Any], tools: Tools, found: set[str], first: int = 1) -> ReadTurns:
    """Read turns in OpenAI's or ShareGPT's format, or a mix of both.

    `found` collects remarks for the user; `first` is the number of the first turn, for messages.
    Raises `BadRecordError`.
    """
    messages: list[Message] = []
    learned: list[bool] = []
    own_tools: object = None
    for number, given in enumerate(_one_by_one(turns), start=first):
        turn = parsed(given)
        if not isinstance(turn, Mapping):
            raise BadRecordError("a turn is not an object", f"turn {number}: {brief(repr(turn))}")
        speaker = _speaker(turn, number)
        message, is_learned = _message(turn, speaker, number, without_fills(tools, given), found)
        is_parallel = bool(messages) and _is_call_alone(messages[-1]) and learned[-1] == is_learned
        if speaker in _CALL_SPEAKERS and is_parallel:  # one turn per call
            calls = [*messages[-1]["tool_calls"], *message["tool_calls"]]
            messages[-1] = {**messages[-1], "tool_calls": calls}
            continue
        for key in ("tools", "functions"):
            own_tools = own_tools or turn.get(key)
        messages.append(message)
        learned.append(is_learned)
    named = with_call_ids(messages)
    return ReadTurns(
        messages=named,
        learned=tuple(
            at for at, message in enumerate(named) if message["role"] == "assistant" and learned[at]
        ),
        tools=own_tools,
    )


def _one_by_one(turns: Sequence[Any]) -> list[Any]:
    """Divide turns that hold a round each, by speaker: {"human": ..., "assistant": ...}.

    Firefly and BELLE write them so, XTuner as system, input and output.
    """
    return [said for given in turns for said in _speakers(parsed(given)) or (given,)]


def _speakers(turn: Any) -> list[Mapping[str, Any]]:
    """Return a turn for each key of one that has the speakers as its keys; none for other turns."""
    if not isinstance(turn, Mapping):
        return []
    roles = {key: _ROUND.get(_word(key)) or ROLES.get(_word(key)) for key in turn}
    said = {key: text for key, text in turn.items() if text is not None}
    is_round = roles and set(roles.values()) <= {"system", "user", "assistant"}
    if not is_round or not all(isinstance(text, str) for text in said.values()):
        return []
    return [
        {"role": roles[key], "content": text}
        for key, text in said.items()
        if text or roles[key] != "system"
    ]  # fmt: skip


def are_turns(value: object) -> bool:
    """Return whether a value is a list of turns, not text that happens to be a JSON list."""
    return isinstance(value, list) and all(
        isinstance(turn, Mapping) and not turn.keys().isdisjoint(("role", "from")) for turn in value
    )


def is_answer(turn: object) -> bool:
    """Whether a turn is the model's, whatever is wrong with it otherwise."""
    named = [turn.get(key) for key in ("role", "from")] if isinstance(turn, Mapping) else []
    return any(ROLES.get(_word(name)) == "assistant" for name in named)


def _word(name: object) -> str:
    """Return who speaks in small letters: "User", "ASSISTANT" and "Human:" are common too."""
    return name.strip().rstrip(":").lower() if isinstance(name, str) else ""


def _speaker(turn: Mapping[str, Any], number: int) -> str:
    """Return the word of `ROLES` that says who speaks."""
    named = [turn[key] for key in ("role", "from") if turn.get(key) is not None]
    roles = {ROLES.get(_word(name)) for name in named}
    if len(roles) == 1 and None not in roles:
        return _word(named[0])
    if not named:
        raise BadRecordError("a turn has no role", f"turn {number}: its keys are {brief_list(turn)}")
    unknown = next((name for name in named if _word(name) not in ROLES), None)
    if named and unknown is None:
        raise BadRecordError("role and from differ", f"turn {number}: {brief_list(named)}")
    raise BadRecordError("unknown role", f"{brief(repr(unknown))}, known are {', '.join(ROLES)}")


def _message(
    turn: Mapping[str, Any], speaker: str, number: int, tools: Tools, found: set[str]
) -> tuple[Message, bool]:
    role = ROLES[speaker]
    content = _content(turn, number)
    calls: object = None
    for key in _CALL_KEYS:
        calls = turn[key] if not calls and turn.get(key) else calls
    if speaker in _CALL_SPEAKERS and not calls:
        calls, content = content, ""
        if isinstance(parsed(calls), str):
            raise BadRecordError("a function call is not JSON with name and arguments", brief(repr(calls)))
    message: dict[str, Any] = {
        "role": role,
        "content": text_of_parts(content, is_result=role == "tool", found=found),
    }
    message |= {key: turn[key] for key in _KEPT if turn.get(key) is not None}
    if calls and (read := read_calls(calls, tools, found)):
        message["tool_calls"] = read
    elif turn.keys().isdisjoint((*_CONTENT_KEYS, *_CALL_KEYS)):
        raise BadRecordError("a turn has no content", f"turn {number}: its keys are {brief_list(turn)}")
    for key in turn.keys() - _USED - _marked(turn, number):
        if turn[key] not in (None, "", [], {}):
            found.add(KEYS_NOT_USED.format(brief(repr(key), 40)))
    return message, is_turn_learned(turn, content, role, number, found)


def _marked(turn: Mapping[str, Any], number: int) -> set[str]:
    """Return the keys of a turn that say, themselves or within, whether it is learned."""
    return {str(key).partition(".")[0] for key in marks_of(turn, number)}


def _content(turn: Mapping[str, Any], number: int) -> object:
    given = [turn[key] for key in _CONTENT_KEYS if turn.get(key) is not None]
    if len(given) > 1 and given[0] != given[1]:
        raise BadRecordError("content and value differ", f"turn {number}")
    return given[0] if given else None


def _is_call_alone(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message["content"]


def turns_in(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, list[Any]]:
    """Return the first of the columns `names` with turns, and the turns; a struct of lists is transposed.

    Old versions of `datasets` store a list of turns as a struct of lists.
    """
    given = [name for name in names if fields.get(name) is not None]
    name = next((name for name in given if fields[name]), (given or names)[0])
    value = parsed(fields.get(name))
    columns = list(value.values()) if isinstance(value, Mapping) else []
    if all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1:
        return name, [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return name, list_in(value, name)


def with_system(messages: tuple[Message, ...], system: object, found: set[str]) -> tuple[Message, ...]:
    """Prepend a system prompt from its own column to the turns.  Raises `BadRecordError` for two."""
    if not system:
        return messages
    text = text_of(system)
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() not in ("", text.strip()):
            raise BadRecordError(
                "two system prompts", f"{brief(repr(text), 40)} beside the turns, another as the first turn"
            )
        return ({**messages[0], "content": text}, *messages[1:])
    found.add("the system prompt stands beside the turns: it is put before them")
    return ({"role": "system", "content": text}, *messages)


def system_text(value: object) -> str:
    """Return a system prompt that stands beside the turns: text, parts of it, or a turn.

    Raises `BadRecordError`.
    """
    value = parsed(value)
    if isinstance(value, Mapping):
        value = _content(value, 0) or [{"type": "text", **part} for part in value.get("parts") or ()]
    return text_of_parts(value, is_result=False, found=set())


#: Names of speakers, and their roles.
ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's name for it since 2024
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",  # Gemma's and Gemini's
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "prompter": "user",  # Open Assistant's
    "chatbot": "assistant",  # Cohere's
    "environment": "tool",  # OLMo's
    "function_call": "assistant",
    "function-call": "assistant",
    "tool_call": "assistant",
    "tool-call": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's name for it before tool calls
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function-response": "tool",
    "tool-response": "tool",
    "tool_result": "tool",
    "tool_output": "tool",
    "function_result": "tool",
    "function_output": "tool",
    "ipython": "tool",  # Llama 3.1's
}
_ROUND = {"input": "user", "output": "assistant"}
_CALL_SPEAKERS = frozenset({"function_call", "function-call", "tool_call", "tool-call"})
#: Keys of a turn that hold its calls, one or several.
_CALL_KEYS = ("tool_calls", "function_call", "tool_call", "function_calls")
_CONTENT_KEYS = ("content", "value")
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")

_USED = frozenset(
    {"role", "from", *_CONTENT_KEYS, *_CALL_KEYS, "tools", "functions"}
    | {*_KEPT, *FLAGS, *FLAGS_AGAINST, *UNCLEAR}
    | {"id", "index"}  # of the turn: bookkeeping
)
