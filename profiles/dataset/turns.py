"""Convert the turns of a conversation from various formats to OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autosft.profiles.dataset.json_records import parsed
from autosft.profiles.dataset.problems import BadRecordError, brief, brief_list
from autosft.profiles.dataset.text_values import list_in, text_of, text_of_parts
from autosft.profiles.dataset.tool_calls import Tools, read_calls, with_call_ids, without_fills

Message = Mapping[str, Any]  # in OpenAI's terms: role, content, tool_calls, ...

MARKED = "answers are marked as not to be learned"
NOT_LEARNED = MARKED + " (by {}): they are read only"
ONLY_ANSWERS = "turns that are no answers are marked to be learned: they are read only"
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
    for number, given in enumerate(turns, start=first):
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
    for key in turn.keys() - _USED - _marks(turn, number).keys():
        if turn[key] not in (None, "", [], {}):
            found.add(KEYS_NOT_USED.format(brief(repr(key), 40)))
    return message, _is_learned(turn, content, role, number, found)


def _content(turn: Mapping[str, Any], number: int) -> object:
    given = [turn[key] for key in _CONTENT_KEYS if turn.get(key) is not None]
    if len(given) > 1 and given[0] != given[1]:
        raise BadRecordError("content and value differ", f"turn {number}")
    return given[0] if given else None


def _is_call_alone(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message["content"]


def _is_learned(turn: Mapping[str, Any], content: object, role: str, number: int, found: set[str]) -> bool:
    """Return whether a turn is learned, by its own marks or those of its parts."""
    marks = _marks(turn, number)
    if isinstance(content, list):
        parts = [_part_mark(part, number) for part in content if isinstance(part, Mapping)]
        if len(set(parts)) > 1:
            raise BadRecordError("a turn is to be learned in parts", f"turn {number}")
        if parts and parts[0] is not None:
            marks["its parts"] = parts[0]
    if role != "assistant":
        if any(marks.values()):
            found.add(ONLY_ANSWERS)
        return False
    for key in _UNCLEAR:
        if turn.get(key) not in (None, [], {}, ""):
            raise BadRecordError(
                "a turn is marked in a way that cannot be followed",
                f"turn {number}: {key} {brief(turn[key], 40)}; weight 0 or train false would say it",
            )
    against = [key for key, mark in marks.items() if not mark]
    if against:
        found.add(NOT_LEARNED.format(brief_list(against)))
    return not against


def _part_mark(part: Mapping[str, Any], number: int) -> bool | None:
    marks = _marks(part, number)
    return all(marks.values()) if marks else None


def _marks(turn: Mapping[str, Any], number: int) -> dict[str, bool]:
    """Return the keys that say whether a turn or a part of one is learned, and what they say."""
    marks = {}
    for key, value in turn.items():
        name = str(key).lower().replace("-", "_")
        if value is not None and name in FLAGS:
            marks[key] = flag(value, f"turn {number}: {key}")
        elif value is not None and name in _FLAGS_AGAINST:
            marks[key] = not flag(value, f"turn {number}: {key}")
    return marks


def flag(value: object, what: str) -> bool:
    """Return 0, 1, true, false, or their text, as bool.  Raises `BadRecordError` for other values."""
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower(), value)
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise BadRecordError("a weight that is neither 0 nor 1", f"{what} is {brief(repr(value), 40)}")


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
_CALL_SPEAKERS = frozenset({"function_call", "function-call", "tool_call", "tool-call"})
#: Keys of a turn that hold its calls, one or several.
_CALL_KEYS = ("tool_calls", "function_call", "tool_call", "function_calls")
_CONTENT_KEYS = ("content", "value")
_KEPT = ("name", "tool_call_id", "reasoning_content", "thinking", "reasoning")

#: Keys of a turn that mark whether it is learned: mistral-finetune's, Axolotl's, ms-swift's and others'.
FLAGS = frozenset(
    f"{before}{word}"
    for before in (
        "", "is_", "do_", "should_", "to_", "use_", "use_in_", "in_", "with_", "include_", "compute_",
        "calculate_", "apply_",
    )
    for word in (
        "weight", "weights", "train", "training", "trained", "trainable", "train_on", "train_on_turn",
        "train_on_this", "learn", "learned", "learnable", "loss", "loss_weight", "loss_weights", "loss_mask",
        "loss_scale", "supervise", "supervised",
    )
)  # fmt: skip
#: Keys that say the opposite.
_FLAGS_AGAINST = frozenset(
    f"{before}{word}"
    for before in ("", "is_", "do_", "should_")
    for word in (
        "ignore", "ignored", "ignore_loss", "skip", "skipped", "skip_loss", "exclude", "excluded", "frozen",
        "no_train", "no_training", "no_loss", "no_learn", "not_train", "not_trained", "not_learned",
        "context_only", "prompt_only",
    )
)  # fmt: skip
#: Marks of parts of a turn, and one that some read as "learned" and others as the opposite.
_UNCLEAR = ("train_detail", "mask", "masked")
_WORDS = {"0": 0, "0.0": 0, "false": 0, "no": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}
_USED = frozenset(
    {"role", "from", *_CONTENT_KEYS, *_CALL_KEYS, "tools", "functions"}
    | {*_KEPT, *FLAGS, *_FLAGS_AGAINST, *_UNCLEAR}
    | {"id", "index"}  # of the turn: bookkeeping
)
