"""Training data formats: recognised by their columns and made into one internal form."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autosft.profiles.dataset.problems import BadRecord
from autosft.profiles.dataset.readers import Record

Message = Mapping[str, Any]  # in OpenAI's terms: role, content, tool_calls, ...


class DataFormat(enum.Enum):
    """A recognised format of training data."""

    MESSAGES = "messages"  #: OpenAI: {"messages": [{"role": ..., "content": ...}], "tools": [...]}
    SHAREGPT = "sharegpt"  #: {"conversations": [{"from": "human", "value": ...}], "tools": "[...]"}
    ALPACA = "alpaca"  #: {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [...]}
    PROMPT_COMPLETION = "prompt-completion"  #: {"prompt": ..., "completion": ...}, text or messages
    TEXT = "text"  #: {"text": ...} or a .txt file

    @property
    def label(self) -> str:
        """The format in words."""
        return _LABELS[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages in OpenAI's roles, ending with an answer; tool calls carry their arguments as objects."""

    where: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    learned: tuple[int, ...]  # positions of the assistant messages that are scored
    is_cut: bool = False  # later rounds were left out (`cut_rounds`)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt and the text that follows it; only the completion is scored."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A document of plain text, or a part of one; every token is scored."""

    where: str
    text: str
    document: int = 0
    part: int = 0  # position in the document: part n + 1 continues part n


Example = Conversation | Completion | Passage


class _BadRecordError(Exception):
    """A record breaks a rule of its format; `reason` is what such records are counted by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def recognise(record: Record) -> DataFormat | None:
    """Tell the format of a record by its columns, or None where they fit none."""
    fields = record.fields
    for key in ("messages", "conversations"):
        if fields.get(key) is not None:
            turns = _parsed(fields[key])
            first = turns[0] if isinstance(turns, list) and turns else None
            if isinstance(first, dict) and "from" in first:
                return DataFormat.SHAREGPT
            if isinstance(first, dict) and "role" in first:
                return DataFormat.MESSAGES
            return DataFormat.MESSAGES if key == "messages" else DataFormat.SHAREGPT
    for columns, data_format in _COLUMNS:
        if columns <= fields.keys():
            return data_format
    return None


def to_example(record: Record, data_format: DataFormat, max_rounds: int | None = None) -> Example | BadRecord:
    """Make the internal form of a record, or say what is wrong with it."""
    try:
        example = _CONVERTERS[data_format](record)
        if isinstance(example, Conversation):
            example = _checked(cut_rounds(example, max_rounds))
        return example
    except _BadRecordError as bad:
        return BadRecord(where=record.where, reason=bad.reason, detail=bad.detail)


def columns_in_words(record: Record) -> str:
    """Return the columns of a record that was not recognised, and those that would be."""
    known = "messages | conversations | instruction, output | prompt, completion | text"
    return f"its columns are {', '.join(map(str, record.fields)) or 'none'}; expected one of: {known}"


def _from_messages(record: Record) -> Conversation:
    fields = record.fields
    turns = fields.get("messages") if fields.get("messages") is not None else fields.get("conversations")
    messages = _openai_messages(_list(turns, "messages"))
    return Conversation(
        where=record.where, messages=messages, tools=_tools(fields.get("tools")), learned=_learned(messages)
    )


def _from_sharegpt(record: Record) -> Conversation:
    fields = record.fields
    turns = fields.get("conversations") if fields.get("conversations") is not None else fields.get("messages")
    messages: list[Message] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": _text(fields["system"])})
    for turn in _list(turns, "conversations"):
        if not isinstance(turn, Mapping):
            raise _BadRecordError("a turn is not an object", repr(turn)[:60])
        speaker = turn.get("from")
        role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise _BadRecordError("unknown role", f"{speaker!r}, known are {', '.join(_SHAREGPT_ROLES)}")
        if speaker == "function_call":
            calls = _parsed(turn.get("value"))
            calls = calls if isinstance(calls, list) else [calls]
            messages.append({"role": role, "content": "", "tool_calls": _tool_calls(calls)})
        else:
            messages.append({"role": role, "content": _text(turn.get("value"))})
    named = _with_call_ids(messages)
    return Conversation(
        where=record.where, messages=named, tools=_tools(fields.get("tools")), learned=_learned(named)
    )


def _from_alpaca(record: Record) -> Conversation:
    fields = record.fields
    messages: list[Message] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": _text(fields["system"])})
    for round_ in _list(fields.get("history") or [], "history"):
        if not (isinstance(round_, Sequence) and not isinstance(round_, str) and len(round_) == 2):
            raise _BadRecordError("history is not a list of [instruction, answer] pairs", repr(round_)[:60])
        messages.append({"role": "user", "content": _text(round_[0])})
        messages.append({"role": "assistant", "content": _text(round_[1])})
    # Instruction and input are joined as LLaMA-Factory does (its data/README.md: "instruction\ninput").
    question = [_text(fields[key]) for key in ("instruction", "input") if fields.get(key)]
    messages.append({"role": "user", "content": "\n".join(question)})
    messages.append({"role": "assistant", "content": _text(fields.get("output") or "")})
    return Conversation(where=record.where, messages=tuple(messages), learned=_learned(messages))


def _from_prompt_completion(record: Record) -> Example:
    prompt, completion = _parsed(record.fields["prompt"]), _parsed(record.fields["completion"])
    if _are_messages(prompt) and _are_messages(completion):
        asked = _openai_messages(prompt)
        messages = asked + _openai_messages(completion)
        learned = tuple(position for position in _learned(messages) if position >= len(asked))
        return Conversation(
            where=record.where, messages=messages, tools=_tools(record.fields.get("tools")), learned=learned
        )
    text = Completion(
        where=record.where,
        prompt=_text(record.fields["prompt"]),
        completion=_text(record.fields["completion"]),
    )
    if not text.completion.strip():
        raise _BadRecordError("empty answer", "the completion is empty")
    if not text.prompt.strip():
        raise _BadRecordError("empty content", "the prompt is empty")
    return text


def _are_messages(value: object) -> bool:
    """Tell messages from text, also from text that happens to be a JSON list."""
    return isinstance(value, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)


def _from_text(record: Record) -> Passage:
    text = _text(record.fields["text"])
    if not text.strip():
        raise _BadRecordError("empty content", "the text is empty")
    return Passage(where=record.where, text=text)


def _openai_messages(turns: Sequence[Any]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise _BadRecordError("a turn is not an object", repr(turn)[:60])
        role = _OPENAI_ROLES.get(turn.get("role", ""))
        if role is None:
            raise _BadRecordError(
                "unknown role", f"{turn.get('role')!r}, known are {', '.join(_OPENAI_ROLES)}"
            )
        message: dict[str, Any] = {"role": role, "content": _text_of_parts(turn.get("content"))}
        message |= {key: turn[key] for key in _KEPT_KEYS if turn.get(key) is not None}
        calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
        if calls:
            message["tool_calls"] = _tool_calls(_list(calls, "tool_calls"))
        messages.append(message)
    return _with_call_ids(messages)


def _tool_calls(calls: Sequence[Any]) -> list[Message]:
    """Calls in OpenAI's form, with arguments as an object: chat templates write them as JSON themselves."""
    made: list[Message] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise _BadRecordError("a function call is not JSON with name and arguments", repr(call)[:60])
        arguments = _parsed(function.get("arguments") if function.get("arguments") is not None else {})
        if not isinstance(arguments, Mapping):
            raise _BadRecordError(
                "a function call's arguments are not a JSON object", repr(function.get("arguments"))[:60]
            )
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append(
            {
                **identity,
                "type": "function",
                "function": {"name": function["name"], "arguments": dict(arguments)},
            }
        )
    return made


def _with_call_ids(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Number calls that have no id, and name in each result the call that it answers.

    Nine letters and digits, as Mistral's templates demand (mistral-common, InstructRequestNormalizer).
    """
    named: list[Message] = []
    open_ids: list[str] = []
    number = 0
    for message in messages:
        if message.get("tool_calls"):
            calls = []
            for call in message["tool_calls"]:
                calls.append({"id": f"call{number:05d}", **call})
                number += 1
            open_ids = [call["id"] for call in calls]
            named.append({**message, "tool_calls": calls})
        elif message["role"] == "tool":
            call_id = open_ids.pop(0) if open_ids else f"call{max(0, number - 1):05d}"
            named.append({"tool_call_id": call_id, **message})
        else:
            named.append(message)
    return tuple(named)


def _tools(tools: object) -> tuple[Mapping[str, Any], ...]:
    """Read the tools column: a list or its JSON, each tool in OpenAI's form or just the function in it."""
    listed = _parsed(tools) if tools else []
    if not listed:
        return ()
    if not (isinstance(listed, list) and all(isinstance(tool, Mapping) for tool in listed)):
        raise _BadRecordError("tools are not a JSON list of objects", repr(tools)[:60])
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in listed)


def _learned(messages: Sequence[Message]) -> tuple[int, ...]:
    """Answers that are scored: all but those with OpenAI's `weight` 0."""
    return tuple(
        position
        for position, message in enumerate(messages)
        if message["role"] == "assistant" and message.get("weight", 1) != 0
    )


def cut_rounds(conversation: Conversation, max_rounds: int | None) -> Conversation:
    """Keep the first rounds; a round starts with a user turn and lasts until the next one's.

    The system message stays, and the end is an answer.  What is left may hold no scored answer.
    """
    messages = conversation.messages
    starts = [
        position
        for position, message in enumerate(messages)
        if message["role"] == "user" and (position == 0 or messages[position - 1]["role"] != "user")
    ]
    is_cut = max_rounds is not None and len(starts) > max_rounds
    kept = messages[: starts[max_rounds]] if max_rounds is not None and is_cut else messages
    # Turns after the last answer are answered by nothing: they would only cost time.
    while kept and kept[-1]["role"] != "assistant":
        kept = kept[:-1]
    return replace(
        conversation,
        messages=kept,
        learned=tuple(turn for turn in conversation.learned if turn < len(kept)),
        is_cut=conversation.is_cut or is_cut,
    )


def _checked(conversation: Conversation) -> Conversation:
    """Hold what every chat template needs; what only some cannot render shows when it is rendered."""
    messages = conversation.messages
    if not messages:
        raise _BadRecordError("no assistant turn", "there is nothing to learn from")
    if not conversation.learned:
        raise _BadRecordError("no assistant turn that is scored", "every answer has weight 0")
    if messages[0]["role"] == "assistant":
        raise _BadRecordError("starts with an assistant turn", "there is nothing that it answers")
    previous = ""
    for number, message in enumerate(messages, start=1):
        role, empty = message["role"], not message["content"].strip()
        if role == "assistant" and empty and not message.get("tool_calls"):
            raise _BadRecordError("empty answer", f"turn {number} has no content and calls no tool")
        if role == "user" and empty:
            raise _BadRecordError("empty content", f"turn {number}, from the user")
        if role == "tool" and previous not in ("calls", "tool"):
            raise _BadRecordError("a tool result without a call", f"turn {number}")
        previous = "calls" if message.get("tool_calls") else role
    return conversation


def _text_of_parts(content: object) -> str:
    """Text of a message's content, which OpenAI also writes as a list of parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return _text(content)
    for part in content:
        if not (isinstance(part, Mapping) and part.get("type") == "text"):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise _BadRecordError("content that is not text", f"a part of type {kind!r}")
    return "".join(_text(part.get("text")) for part in content)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _BadRecordError("content that is not text", repr(value)[:60])
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _BadRecordError(
                "not valid Unicode", f"half of a surrogate pair: {error.object[error.start]!r}"
            ) from None
    return value


def _list(value: object, name: str) -> list[Any]:
    parsed = _parsed(value)
    if not isinstance(parsed, list):
        raise _BadRecordError(f"{name} is not a list", repr(value)[:60])
    return parsed


def _parsed(value: Any) -> Any:
    """Return the value, or what it holds where it is JSON in a string, as in CSV and in the tools column."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


_LABELS = {
    DataFormat.MESSAGES: "OpenAI messages",
    DataFormat.SHAREGPT: "ShareGPT conversations",
    DataFormat.ALPACA: "Alpaca instructions",
    DataFormat.PROMPT_COMPLETION: "prompt and completion",
    DataFormat.TEXT: "plain text",
}
_COLUMNS = (
    ({"instruction", "output"}, DataFormat.ALPACA),
    ({"prompt", "completion"}, DataFormat.PROMPT_COMPLETION),
    ({"text"}, DataFormat.TEXT),
)
_CONVERTERS: dict[DataFormat, Callable[[Record], Example]] = {
    DataFormat.MESSAGES: _from_messages,
    DataFormat.SHAREGPT: _from_sharegpt,
    DataFormat.ALPACA: _from_alpaca,
    DataFormat.PROMPT_COMPLETION: _from_prompt_completion,
    DataFormat.TEXT: _from_text,
}
_OPENAI_ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's name for it since 2024
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # OpenAI's name for it before tool calls
}
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_KEPT_KEYS = ("name", "tool_call_id", "weight", "reasoning_content", "thinking", "reasoning")
