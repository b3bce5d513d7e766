"""Render conversations with the tokenizer's chat template and find their scored spans: the answers.

An answer is what the model must produce itself: everything from the end of the generation prompt to the end
of its turn, including the end-of-turn token.  Templates with `{% generation %}` marks delimit it.  For all
others it is found by rendering: it starts where the conversation before it, with the generation prompt, ends,
and ends where the conversation including it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autosft.profiles.dataset.formats import Conversation
from autosft.profiles.dataset.problems import ANSWER_HIDDEN
from autosft.profiles.dataset.template import ChatTemplate, RenderError, adapted, shared_length
from autosft.profiles.dataset.turns import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """One conversation as text, with its scored spans."""

    where: str
    text: str
    spans: tuple[tuple[int, int], ...]  # characters that are scored, in order, not overlapping
    answers: tuple[str, ...]  # must occur in the scored text
    context: tuple[str, ...]  # must occur in the unscored text
    num_turns: int


def render(template: ChatTemplate, conversation: Conversation) -> list[Rendered]:
    """Render a conversation and find the spans of its answers.

    The result is one example if the template renders answers independently of what follows.  If it rewrites
    earlier answers (for example drops their thinking), there is one example per answer, which ends with it,
    so that every answer is learned in the form in which the model has to produce it.

    Raises `RenderError` for what the template cannot render or does not show.
    """
    messages = adapted(template, conversation)
    tools = conversation.tools if template.lists_tools else ()
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    was_turn = [turn for turn, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    learned = [turn for turn, was in zip(turns, was_turn, strict=True) if was in conversation.learned]
    where = conversation.where

    text, marks = template.render(messages, tools)
    if len(marks) == len(turns):
        marks = [mark for mark, turn in zip(marks, turns, strict=True) if turn in learned]
    if marks and (len(marks) == len(learned) or len(learned) == len(turns)):
        spans = [(start, _with_end_of_turn(template, text, start, end)) for start, end in marks]
        marked = _rendered(where, messages, learned, text, spans)
        if all(any(answer in text[start:end] for start, end in spans) for answer in marked.answers):
            return [marked]

    spans = []
    for turn in learned:  # one at a time: together they are quadratic in the conversation's size
        closed = _closed(template, messages, tools, turn, text)
        spans.append(_answer_span(template, messages, tools, turn, closed))
        if not text.startswith(closed[: spans[-1][1]]):
            break
    else:
        return [_rendered(where, messages, learned, text, spans)]
    made = []
    for turn in learned:
        closed = _closed(template, messages, tools, turn, text)
        span = _answer_span(template, messages, tools, turn, closed)
        made.append(_rendered(where, messages[: turn + 1], [turn], closed, [span]))
    return made


def _closed(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any], turn: int, text: str
) -> str:
    """Render all messages up to the answer `turn`; `text` is all of them."""
    is_last = not any(message["role"] == "assistant" for message in messages[turn + 1 :])
    return text if is_last else template.render(messages[: turn + 1], tools)[0]


def _answer_span(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any], turn: int, closed: str
) -> tuple[int, int]:
    """Find answer `turn`, including its end of turn, in `closed`, the text of all messages up to it."""
    prompt, _ = template.render(messages[:turn], tools, generation_prompt=True)
    parts = _answer_parts(messages[turn])
    start = shared_length(prompt, closed)
    if start < len(prompt):
        # The generation prompt may differ from what the template writes before past answers: DeepSeek R1's
        # opens a <think>.  A word or tag that only begins like it belongs to the answer.
        start = 1 + max(prompt.rfind(mark, 0, start) for mark in _WORD_ENDS)
    elif not template.has_generation_prompt and template.header.strip():
        # A header that is not in the prompt is not the model's text either; a space alone is (Llama 2).
        start += len(template.header) if closed.startswith(template.header, start) else 0
    end = start
    for part in parts:
        found = closed.find(part, start)  # the first: a short answer may recur in the end of turn
        if found < 0:
            shown = part if len(part) <= 60 else f"{part[:57]}..."
            raise RenderError(ANSWER_HIDDEN, repr(shown))
        end = max(end, found + len(part))
    if template.end_of_turn and (found := closed.find(template.end_of_turn, end)) >= 0:
        return start, found + len(template.end_of_turn)
    return start, max(end, len(closed.rstrip()))


def _with_end_of_turn(template: ChatTemplate, text: str, start: int, end: int) -> int:
    """Extend a marked span by the end-of-turn token if the marks exclude it: it must be learned too."""
    token = template.end_of_turn.strip()
    if not token or text[start:end].rstrip().endswith(token):
        return end
    gap = len(text[end:]) - len(text[end:].lstrip())
    return end + gap + len(token) if text.startswith(token, end + gap) else end


def _answer_parts(message: Message) -> list[str]:
    """Return the texts of an answer that must occur where it is rendered, in order.

    Thinking and the rest are separate: templates rewrite the tags and the space around them.
    """
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key)), "")
    thinking, tag, content = message["content"].rpartition("</think>")
    names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
    parts = (reasoning, thinking.removeprefix("<think>") if tag else "", content, *names)
    return [part.strip() for part in parts if part.strip()]


def _rendered(
    where: str,
    messages: Sequence[Message],
    learned: Sequence[int],
    text: str,
    spans: Sequence[tuple[int, int]],
) -> Rendered:
    context = [message["content"].strip() for turn, message in enumerate(messages) if turn not in learned]
    return Rendered(
        where=where,
        text=text,
        spans=tuple(spans),
        answers=tuple(part for turn in learned for part in _answer_parts(messages[turn])),
        context=tuple(part for part in context if part),
        num_turns=len(messages),
    )


_WORD_ENDS = " \n>]:"
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
