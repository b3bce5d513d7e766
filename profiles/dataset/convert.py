"""Convert records of any format to examples, or report what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autosft.profiles.dataset.columns import (
    LEARNED_TURNS,
    MEDIA,
    MEDIA_MARKS,
    PREFERENCE,
    SPLIT,
    SYSTEM,
    TOOLS,
    TURNS,
)
from autosft.profiles.dataset.formats import (
    Completion,
    Conversation,
    DataFormat,
    Example,
    Passage,
    cut_rounds,
)
from autosft.profiles.dataset.json_values import parsed
from autosft.profiles.dataset.marks import MARKED, is_record_mark, may_mark, why_left_out
from autosft.profiles.dataset.problems import BadRecord, BadRecordError, brief, brief_list
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.text_values import list_in, text_of
from autosft.profiles.dataset.tool_calls import Tools, read_tools, without_fills
from autosft.profiles.dataset.turns import (
    Message,
    ReadTurns,
    are_turns,
    is_answer,
    read_turns,
    system_text,
    turns_in,
    with_system,
)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A record that is marked as not to be learned from."""

    why: str


def to_example(
    record: Record,
    data_format: DataFormat,
    max_rounds: int | None = None,
    *,
    source: int = 0,
    is_evaluated: bool = False,
) -> Example | BadRecord | LeftOut:
    """Convert a record to an example, or return what is wrong with it or why it is left out.

    A training record is left out if its `split` column names another split; evaluation records are kept.
    """
    found: set[str] = set()
    try:
        if (why := _why_left_out(record.fields, data_format, is_evaluated)) is not None:
            return LeftOut(why)
        example = _CONVERTERS[data_format](record, found)
        if isinstance(example, Conversation):
            if not example.learned and any(said.startswith(MARKED) for said in found):
                return LeftOut("all their answers are marked as not to be learned")
            example = _checked(cut_rounds(example, max_rounds))
        return replace(example, source=source, found=frozenset(found))
    except BadRecordError as bad:
        return BadRecord(where=record.where, reason=bad.reason, detail=bad.detail)


def unused_columns(record: Record, data_format: DataFormat) -> list[str]:
    """Return the names of non-empty columns that are not read."""
    used = _USED_BY[data_format]
    return [
        str(name)
        for name, value in record.fields.items()
        if name not in used
        and value not in _NOTHING
        and not is_record_mark(name, value, is_text=data_format is DataFormat.TEXT)
        and not (value is False and may_mark(str(name)))
        and not (name in LEARNED_TURNS and used is _OF_TURNS and isinstance(parsed(value), list))
    ]


def _why_left_out(fields: Mapping[str, Any], data_format: DataFormat, is_evaluated: bool) -> str | None:
    """Return why a record is not learned, else None.  Raises `BadRecordError` for preference data."""
    is_text = data_format is DataFormat.TEXT
    if (why := why_left_out(fields, is_text=is_text, is_evaluated=is_evaluated)) is not None:
        return why
    if not is_text and all(fields.get(name) for name in PREFERENCE):
        raise BadRecordError("a better and a worse answer", "such pairs are for preference training, not SFT")
    return None


def _from_turns(record: Record, found: set[str]) -> Conversation:
    fields = record.fields
    name, turns = turns_in(fields, TURNS)
    turns = _with_marks(turns, fields)
    tools = without_fills(_tools(record, found), fields.get(name))
    read = read_turns(turns, tools, found)
    if read.tools:
        columns = [*map(fields.get, TOOLS), read.tools]
        tools = read_tools(columns, fills_nulls=record.fills_nulls, found=found)
        read = read_turns(turns, without_fills(tools, fields.get(name)), found)
    return _conversation(record, read, tools, found)


def _with_marks(turns: Sequence[Any], fields: Mapping[str, Any]) -> list[Any]:
    """Put the marks of a column that lists one for each turn, or for each answer, into the turns.

    Raises `BadRecordError` where it lists another number of them.
    """
    marked = list(turns)
    for name in LEARNED_TURNS:
        marks = parsed(fields.get(name))
        if not isinstance(marks, list) or not marks:
            continue
        answers = [at for at, turn in enumerate(marked) if is_answer(parsed(turn))]
        places = range(len(marked)) if len(marks) == len(marked) else answers
        if len(marks) != len(places):
            raise BadRecordError(
                f"{name} that does not go with the turns",
                f"it lists {len(marks)}, and there are {len(marked)} turns, {len(answers)} of them answers",
            )
        for at, mark in zip(places, marks, strict=True):
            turn = parsed(marked[at])
            if isinstance(turn, Mapping) and turn.get(name) is None:
                marked[at] = {**turn, name: mark}
    return marked


def _conversation(record: Record, read: ReadTurns, tools: Tools, found: set[str]) -> Conversation:
    messages = with_system(read.messages, _system(record.fields), found)
    shift = len(messages) - len(read.messages)
    _refuse_media(record.fields, messages)
    return Conversation(
        where=record.where,
        messages=messages,
        tools=_not_listed(tools.listed, messages, found),
        learned=tuple(turn + shift for turn in read.learned),
    )


def _refuse_media(fields: Mapping[str, Any], messages: Sequence[Message]) -> None:
    """Raise `BadRecordError` for a record that is about a picture or sound in a column of its own."""
    column = next((name for name in MEDIA if fields.get(name) not in _NOTHING), None)
    if column is None:
        return
    for number, message in enumerate(messages, start=1):
        mark = next((mark for mark in MEDIA_MARKS if mark in message["content"]), None)
        if mark is not None:
            raise BadRecordError(
                "content that is not text", f"turn {number} has {mark} for what the column {column} holds"
            )


def _not_listed(
    tools: tuple[Mapping[str, Any], ...], messages: Sequence[Message], found: set[str]
) -> tuple[Mapping[str, Any], ...]:
    """Return the tools that the template has to list: none if the system turn lists them all itself."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    names = [re.escape(str(tool["function"]["name"])) for tool in tools]
    if not system or not names:
        return tools
    if not all(re.search(rf"""["']name["']\s*:\s*["']{name}["']""", system) for name in names):
        return tools
    found.add("the system turn lists the tools itself: they are not listed again")
    return ()


def _from_alpaca(record: Record, found: set[str]) -> Conversation:
    fields = record.fields
    turns: list[Mapping[str, Any]] = []
    for round_ in list_in(fields.get("history") or [], "history"):
        if not (isinstance(round_, Sequence) and not isinstance(round_, str) and len(round_) == 2):
            raise BadRecordError("history is not a list of [instruction, answer] pairs", brief(repr(round_)))
        turns += ({"role": "user", "content": round_[0]}, {"role": "assistant", "content": round_[1]})
    # Instruction and input are joined as LLaMA-Factory does (its data/README.md: "instruction\ninput").
    question = [text_of(fields[key]) for key in ("instruction", "input") if fields.get(key) not in _NOTHING]
    turns.append({"role": "user", "content": "\n".join(question)})
    turns.append({"role": "assistant", "content": _text_or_empty(fields.get("output"))})
    tools = _tools(record, found)
    return _conversation(record, read_turns(turns, tools, found), tools, found)


def _text_or_empty(value: object) -> str:
    return "" if value is None else text_of(value)


def _from_prompt_completion(record: Record, found: set[str]) -> Example:
    fields = record.fields
    prompt, completion = parsed(fields["prompt"]), parsed(fields["completion"])
    if are_turns(prompt) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    elif are_turns(completion) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if are_turns(prompt) and are_turns(completion):
        tools = _tools(record, found)
        read = read_turns([*prompt, *completion], tools, found)
        asked = len(read_turns(prompt, tools, set()).messages)
        read.learned = tuple(turn for turn in read.learned if turn >= asked)
        return _conversation(record, read, tools, found)
    beside = [name for name in (*SYSTEM, *TOOLS) if fields.get(name) not in (*_NOTHING, "[]")]
    if beside:
        raise BadRecordError(
            f"a prompt that is text has no place for {beside[0]}", "write prompt and completion as messages"
        )
    text = Completion(
        where=record.where,
        prompt=_text_or_empty(fields["prompt"]),
        completion=_text_or_empty(fields["completion"]),
    )
    if not text.completion.strip():
        raise BadRecordError("empty answer", "the completion is empty")
    if not text.prompt.strip():
        raise BadRecordError("empty content", "the prompt is empty")
    return text


def _from_text(record: Record, _: set[str]) -> Passage:
    text = text_of(record.fields["text"])
    if not text.strip():
        raise BadRecordError("empty content", "the text is empty")
    return Passage(where=record.where, text=text)


def _tools(record: Record, found: set[str]) -> Tools:
    columns = [record.fields.get(name) for name in TOOLS]
    if not columns[0]:
        for name in TOOLS[1:]:
            if record.fields.get(name):
                form = ", as OpenAI's older form does" if name == "functions" else ""
                found.add(f"the column {name} lists the tools{form}")
    return read_tools(columns, fills_nulls=record.fills_nulls, found=found)


def _system(fields: Mapping[str, Any]) -> object:
    given = [system_text(fields[name]) for name in SYSTEM if fields.get(name)]
    if any(other != given[0] for other in given[1:]):
        raise BadRecordError("two system prompts", brief_list(given))
    return given[0] if given else None


def _checked(conversation: Conversation) -> Conversation:
    """Check what every chat template requires; the rest is found when the conversation is rendered."""
    messages = conversation.messages
    if not messages:
        raise BadRecordError("no assistant turn", "there is nothing to learn from")
    if not conversation.learned:
        raise BadRecordError("no answer to learn", "the rounds that are kept have none, or only marked ones")
    if messages[0]["role"] == "assistant":
        raise BadRecordError("starts with an assistant turn", "there is nothing that it answers")
    previous = ""
    for number, message in enumerate(messages, start=1):
        role, empty = message["role"], not message["content"].strip()
        if role == "assistant" and empty and not message.get("tool_calls"):
            raise BadRecordError("empty answer", f"turn {number} has no content and calls no tool")
        if role == "user" and empty:
            raise BadRecordError("empty content", f"turn {number}, from the user")
        # A call may be text in an answer, in a format of the data's own (Hermes, ToolACE).
        if role == "tool" and previous not in ("assistant", "tool"):
            raise BadRecordError("a tool result without a call", f"turn {number} does not follow an answer")
        previous = role
    return conversation


_CONVERTERS: dict[DataFormat, Callable[[Record, set[str]], Example]] = {
    DataFormat.MESSAGES: _from_turns,
    DataFormat.SHAREGPT: _from_turns,
    DataFormat.ALPACA: _from_alpaca,
    DataFormat.PROMPT_COMPLETION: _from_prompt_completion,
    DataFormat.TEXT: _from_text,
}
_OF_ALL = frozenset({SPLIT})
#: A list of marks is for turns.
_OF_TURNS = frozenset({*TURNS, *SYSTEM, *TOOLS, *_OF_ALL})
_USED_BY: dict[DataFormat, frozenset[str]] = {
    DataFormat.MESSAGES: _OF_TURNS,
    DataFormat.SHAREGPT: _OF_TURNS,
    DataFormat.ALPACA: frozenset({"instruction", "input", "output", "history", *SYSTEM, *TOOLS, *_OF_ALL}),
    DataFormat.PROMPT_COMPLETION: frozenset({"prompt", "completion", *SYSTEM, *TOOLS, *_OF_ALL}),
    DataFormat.TEXT: frozenset({"text", *_OF_ALL}),
}
_NOTHING: tuple[object, ...] = (None, "", [], {})
