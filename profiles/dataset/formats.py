"""Formats of training data, recognised by their columns, and the internal form of records."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autosft.profiles.dataset.columns import PREFERENCE, TURNS
from autosft.profiles.dataset.json_values import parsed
from autosft.profiles.dataset.problems import brief_list
from autosft.profiles.dataset.record import Record
from autosft.profiles.dataset.turns import Message


class DataFormat(enum.Enum):
    """A recognised format of training data."""

    MESSAGES = "messages"  #: OpenAI: {"messages": [{"role": ..., "content": ...}], "tools": [...]}
    SHAREGPT = "sharegpt"  #: {"conversations": [{"from": "human", "value": ...}], "tools": "[...]"}
    ALPACA = "alpaca"  #: {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [...]}
    PROMPT_COMPLETION = "prompt-completion"  #: {"prompt": ..., "completion": ...}, text or messages
    TEXT = "text"  #: {"text": ...} or a .txt file

    @property
    def label(self) -> str:
        """The format's name in messages."""
        return _LABELS[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages with OpenAI's roles, ending with an answer; tool calls have their arguments as objects."""

    where: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    learned: tuple[int, ...]  # positions of the assistant messages that are scored
    is_cut: bool = False  # later rounds were removed (`cut_rounds`)
    source: int = 0  # position of the source among those given
    found: frozenset[str] = frozenset()  # remarks about this record for the user


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt and the text that follows it; only the completion is scored."""

    where: str
    prompt: str
    completion: str
    source: int = 0  # position of the source among those given
    found: frozenset[str] = frozenset()  # remarks about this record for the user


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A document of plain text, or a part of one; every token is scored."""

    where: str
    text: str
    document: int = 0
    part: int = 0  # position in the document: part n + 1 continues part n
    source: int = 0  # position of the source among those given
    found: frozenset[str] = frozenset()  # remarks about this record for the user


Example = Conversation | Completion | Passage


def recognise(record: Record) -> DataFormat | None:
    """Return the format of a record by its columns, None if they match none."""
    fields = record.fields
    present = [name for name in TURNS if fields.get(name) is not None]
    for name in present:
        if not fields[name]:  # of a table that was put together from several
            continue
        turns = parsed(fields[name])
        first = parsed(turns[0]) if isinstance(turns, list) and turns else turns
        if isinstance(first, Mapping) and "from" in first:
            return DataFormat.SHAREGPT
        if isinstance(first, Mapping) and "role" in first:
            return DataFormat.MESSAGES
        return DataFormat.MESSAGES if name == "messages" else DataFormat.SHAREGPT
    for columns, data_format in _COLUMNS:
        if columns <= fields.keys():
            return data_format
    return DataFormat.MESSAGES if present else None


def describe_columns(record: Record) -> str:
    """Describe the columns of an unrecognised record, and those that are expected."""
    if all(record.fields.get(name) is not None for name in PREFERENCE):
        return "it holds a better and a worse answer, which are for preference training, not for SFT"
    known = "messages | conversations | instruction, output | prompt, completion | text"
    return f"its columns are {brief_list(record.fields) or 'none'}; expected one of: {known}"


def cut_rounds(conversation: Conversation, max_rounds: int | None) -> Conversation:
    """Keep the first rounds; a round starts with a user turn and lasts until the next one's.

    The system message is kept, and the result ends with an answer.  It may contain no scored answer.
    """
    messages = conversation.messages
    starts = [
        position
        for position, message in enumerate(messages)
        if message["role"] == "user" and (position == 0 or messages[position - 1]["role"] != "user")
    ]
    is_cut = max_rounds is not None and len(starts) > max_rounds
    kept = messages[: starts[max_rounds]] if max_rounds is not None and is_cut else messages
    # Turns after the last answer have no answer: they would only cost time.
    while kept and kept[-1]["role"] != "assistant":
        kept = kept[:-1]
    return replace(
        conversation,
        messages=kept,
        learned=tuple(turn for turn in conversation.learned if turn < len(kept)),
        is_cut=conversation.is_cut or is_cut,
    )


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
