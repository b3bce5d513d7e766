"""Probe a tokenizer's chat template, and adapt conversations to what it can render."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from autosft.profiles.dataset.formats import Conversation
from autosft.profiles.dataset.template_bounds import bounded_template
from autosft.profiles.dataset.template_date import with_date
from autosft.profiles.dataset.template_parts import with_parts
from autosft.profiles.dataset.turns import Message
from autosft.profiles.errors import UserError


class RenderError(Exception):
    """The chat template cannot render a conversation, or its answers cannot be located."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A tokenizer's chat template, and what probes showed about it."""

    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    model: str  # the tokenizer's name, for messages
    own: str | None = None  # our template, where the tokenizer has none
    end_of_turn: str = ""  # what follows an answer: "<|im_end|>", " </s>"
    has_generation_prompt: bool = True
    header: str = ""  # what the template writes between the generation prompt and an answer
    renders_system: bool = True
    lists_tools: bool = True
    renders_calls: bool = True
    arguments_as_text: bool = False  # it expects a call's arguments as JSON text instead of an object
    date: str | None = None  # the date to use as today's; None: today's

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render messages; return the text and the character spans within `{% generation %}` marks.

        Raises `RenderError` with the template's error.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        listed = list(tools) or None
        try:
            written = self.own or self.tokenizer.get_chat_template(tools=listed)
        except ValueError as error:  # several by name, and none of them "default"
            raise RenderError("the chat template cannot be chosen", str(error).split("! ")[-1]) from error
        jinja = with_date(with_parts(written, self.tokenizer.special_tokens_map), self.date)
        try:
            with bounded_template():
                texts, marks = render_jinja_template(
                    conversations=[list(messages)],
                    tools=listed,
                    chat_template=jinja,
                    add_generation_prompt=generation_prompt,
                    return_assistant_tokens_mask=_MARK.search(jinja) is not None,
                    **self.tokenizer.special_tokens_map,
                )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise RenderError("the chat template cannot render it", str(error)) from error
        return texts[0], [(start, end) for start, end in marks[0] if start < end] if marks else []


def chat_template(tokenizer: Any, model: str, *, date: str | None = None) -> ChatTemplate:
    """Probe how a tokenizer renders conversations; one without a chat template gets a plain ChatML one.

    `date` (ISO 8601) replaces today's date in the template.
    Raises `UserError` for a template that cannot render a question and its answer.
    """
    template = ChatTemplate(
        tokenizer=tokenizer,
        model=model,
        own=None if tokenizer.chat_template else _own_template(tokenizer, model),
        date=date,
    )
    question, answer = {"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}
    remedy = "Correct chat_template.jinja or tokenizer_config.json in the model's folder."
    try:
        text, _ = template.render([question, answer])
        prompt, _ = template.render([question], generation_prompt=True)
        bare, _ = template.render([question])
    except RenderError as error:
        raise UserError(
            f"the chat template of {model} cannot render a question and its answer: {error.detail}",
            remedy=remedy,
        ) from error
    if not 0 <= text.find(_USER) < text.find(_ANSWER):
        raise UserError(
            f"the chat template of {model} does not show a question and its answer, in this order.",
            remedy=remedy,
        )
    start, end = text.find(_ANSWER), text.find(_ANSWER) + len(_ANSWER)
    template = replace(
        template,
        end_of_turn=_end_of_turn(tokenizer, text[end:]),
        has_generation_prompt=prompt != bare,
        header=text[shared_length(prompt, text) : start],
    )
    return _with_tool_traits(replace(template, renders_system=_renders_system(template)))


def adapted(template: ChatTemplate, conversation: Conversation) -> list[Message]:
    """Rewrite what the template cannot render as turns that it can; assistant turns are kept one to one."""
    messages = list(conversation.messages)
    if template.arguments_as_text:
        messages = [_with_arguments_as_text(message) for message in messages]
    if not template.renders_calls:
        messages = _with_calls_as_text(messages)
    if conversation.tools and not template.lists_tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
        system = f"You may call these functions:\n<tools>\n{listed}\n</tools>"
        if messages[0]["role"] == "system":
            messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{system}"}
        else:
            messages.insert(0, {"role": "system", "content": system})
    if messages[0]["role"] == "system" and messages[1]["role"] == "user" and not template.renders_system:
        content = f"{messages[0]['content']}\n\n{messages[1]['content']}".lstrip()
        messages = [{**messages[1], "content": content}, *messages[2:]]
    return messages


def notes(template: ChatTemplate, *, has_system: bool, has_tools: bool) -> list[str]:
    """Return a sentence for each adaptation to this template, for data with system turns or tools."""
    said = []
    if template.own is not None:
        said.append(
            f"{template.model} has no chat template: a plain ChatML one is used, ending turns with "
            f"{template.tokenizer.eos_token}, and saved with every checkpoint"
        )
    subject = f"the chat template of {template.model}"
    if template.date is not None:
        said.append(
            f"{subject} writes today's date: in this data it is {template.date}, whatever the day "
            "(--template-date chooses another)"
        )
    if not template.end_of_turn:
        said.append(f"{subject} writes nothing after an answer: the model cannot learn where to stop")
    if has_tools and not template.lists_tools:
        said.append(f"{subject} lists no tools: they are listed in the system turn")
        has_system = True
    if has_system and not template.renders_system:
        said.append(f"{subject} has no system turn: it is put at the head of the first user turn")
    if has_tools and not template.renders_calls:
        said.append(
            f"{subject} has no tool calls: they are written into the answer as <tool_call>, "
            "their results into a user turn as <tool_response>"
        )
    return said


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself starts every text with its beginning-of-sequence token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def shared_length(first: str, second: str) -> int:
    """Return the length of the longest common prefix of two texts, in characters."""
    if second.startswith(first):
        return len(first)
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))


def _own_template(tokenizer: Any, model: str) -> str:
    """Return the plain ChatML template.  Raises UserError without an end-of-sequence token."""
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {model} has neither a chat template nor an end-of-sequence token, "
            "so a model could not learn where an answer ends.",
            remedy="Set eos_token in its tokenizer_config.json.",
        )
    plain = files(__package__).joinpath("own_template.jinja").read_text(encoding="utf-8").rstrip()
    return "{{- bos_token }}\n" + plain if adds_bos(tokenizer) else plain


def _end_of_turn(tokenizer: Any, tail: str) -> str:
    """Return what ends an answer: everything up to the first special token, else all non-space text."""
    special = "|".join(map(re.escape, sorted(tokenizer.all_special_tokens, key=len, reverse=True)))
    match = re.match(rf"\s*(?:{special})", tail) if special else None
    return match.group() if match else tail.rstrip()


def _renders_system(template: ChatTemplate) -> bool:
    messages = [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ANSWER},
    ]
    return _shows(template, messages, (), [_SYSTEM, _USER, _ANSWER])


def _with_tool_traits(template: ChatTemplate) -> ChatTemplate:
    """Probe whether the template lists tools and renders calls, with arguments as an object or as text."""
    question: Message = {"role": "user", "content": _USER}
    answer: Message = {"role": "assistant", "content": _ANSWER}
    parameters = {"type": "object", "properties": {_ARGUMENT: {"type": "string", "description": _VALUE}}}
    tool = {"name": _TOOL, "description": _SYSTEM, "parameters": parameters}
    call = {"name": _CALL, "arguments": {_ARGUMENT: _VALUE}}
    asked: list[Message] = [
        question,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": _ID, "type": "function", "function": call}],
        },
        {"role": "tool", "content": _RESULT, "tool_call_id": _ID, "name": _CALL},
        answer,
    ]
    shown = [_CALL, _ARGUMENT, _VALUE, _RESULT, _ANSWER]
    as_object = _shows(template, asked, (), shown)
    as_text = not as_object and _shows(template, [_with_arguments_as_text(turn) for turn in asked], (), shown)
    listed = [{"type": "function", "function": tool}]
    return replace(
        template,
        lists_tools=_shows(template, [question, answer], listed, [_TOOL, _SYSTEM, _ARGUMENT, _ANSWER]),
        renders_calls=as_object or as_text,
        arguments_as_text=as_text,
    )


def _shows(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any], parts: Sequence[str]
) -> bool:
    try:
        text, _ = template.render(messages, tools)
    except RenderError:
        return False
    return all(part in text for part in parts)


def _with_arguments_as_text(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _with_calls_as_text(messages: Sequence[Message]) -> list[Message]:
    """Write calls into the answer and results into a user turn, with the tags of Qwen 2.5's template."""
    written: list[Message] = []
    after_result = False
    for message in messages:
        if message.get("tool_calls"):
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
            parts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            written.append({**rest, "content": "\n".join(part for part in parts if part)})
        elif message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                written[-1] = {"role": "user", "content": f"{written[-1]['content']}\n{content}"}
            else:
                written.append({"role": "user", "content": content})
        else:
            written.append(message)
        after_result = message["role"] == "tool"
    return written


_MARK = re.compile(r"\{%-?\s*generation\b")

# Words that do not occur in templates.
_SYSTEM, _USER, _ANSWER, _TOOL, _CALL, _ARGUMENT, _VALUE, _RESULT = (
    f"autosftprobe{number}" for number in range(8)
)
_ID = "call00000"
