"""Remove control tokens from the data that the template or the tokenizer writes as well."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from autosft.profiles.dataset.formats import Completion, Conversation, Passage
from autosft.profiles.dataset.template import ChatTemplate, RenderError, adapted

_RESULT = "autosftproberesult"
_RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTokens:
    """The control tokens that template and tokenizer write around turns."""

    starts: tuple[str, ...]  # before the first turn: the beginning-of-sequence token
    ends: tuple[str, ...]  # after a turn: the template's end of turn, the end-of-sequence token
    marks_results: bool = False  # the template puts <tool_response> around the result of a tool

    def stripped(self, text: str) -> str:
        """Return the text without these tokens at its ends, including repetitions."""
        kept = text
        while (token := next((mark for mark in self.ends if kept.rstrip().endswith(mark)), "")) != "":
            kept = kept.rstrip()[: -len(token)].rstrip()
        while (token := next((mark for mark in self.starts if kept.lstrip().startswith(mark)), "")) != "":
            kept = kept.lstrip()[len(token) :].lstrip()
        return kept


def control_tokens(tokenizer: Any, template: ChatTemplate | None) -> ControlTokens:
    """Determine what a template and a tokenizer write around turns; `template` is None for plain text."""
    end_of_turn = template.end_of_turn.strip() if template is not None else ""
    ends = [token for token in (end_of_turn, tokenizer.eos_token) if token]
    starts = [token for token in (tokenizer.bos_token,) if token]
    return ControlTokens(
        starts=tuple(starts),
        ends=tuple(dict.fromkeys(ends)),
        marks_results=template is not None and _marks_results(template),
    )


def _marks_results(template: ChatTemplate) -> bool:
    call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"x": "y"}}}
    messages: list[Mapping[str, Any]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": _RESULT, "tool_call_id": "call00000", "name": "f"},
        {"role": "assistant", "content": "b"},
    ]
    probe = Conversation(where="", messages=tuple(messages), learned=(3,))
    try:
        text, _ = template.render(adapted(template, probe))
    except RenderError:
        return False
    return f"<tool_response>\n{_RESULT}\n</tool_response>" in text


def without_repeats(conversation: Conversation, tokens: ControlTokens) -> Conversation:
    """Return the conversation without control tokens at its turns' ends that the template writes anyway."""
    contents = [tokens.stripped(message["content"]) for message in conversation.messages]
    if all(new == old["content"] for new, old in zip(contents, conversation.messages, strict=True)):
        return conversation
    messages = tuple(
        {**message, "content": content}
        for message, content in zip(conversation.messages, contents, strict=True)
    )
    return replace(conversation, messages=messages)


def without_result_marks(conversation: Conversation) -> Conversation:
    """Return the conversation with one result per tool turn, without <tool_response> tags."""
    messages: list[Mapping[str, Any]] = []
    positions: list[int] = []
    for message in conversation.messages:
        positions.append(len(messages))
        parts = _responses(message["content"]) if message["role"] == "tool" else []
        messages += [{**message, "content": part} for part in parts] or [message]
    if messages == list(conversation.messages):
        return conversation
    learned = tuple(positions[turn] for turn in conversation.learned)
    return replace(conversation, messages=tuple(messages), learned=learned)


def without_repeats_of_pair(pair: Completion, tokens: ControlTokens) -> Completion:
    """Return a prompt and completion of which the completion ends, and both begin, without such tokens."""
    prompt, completion = replace(tokens, ends=()).stripped(pair.prompt), tokens.stripped(pair.completion)
    if (prompt, completion) == (pair.prompt, pair.completion):
        return pair
    return replace(pair, prompt=prompt, completion=completion)


def without_trailing_space(passage: Passage, tokens: ControlTokens) -> Passage:
    """Return a passage that ends with its last token, where that is one which ends texts."""
    text = passage.text.rstrip()
    return replace(passage, text=text) if text.endswith(tokens.ends) and text != passage.text else passage


def _responses(content: str) -> list[str]:
    """Return the results in a text that is nothing but results in tags; none for other text."""
    parts, position = [], 0
    while match := _RESPONSE.match(content, position):
        parts.append(match[1])
        position = match.end()
    return parts if position == len(content) else []
