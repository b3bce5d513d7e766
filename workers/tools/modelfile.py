"""Write a Modelfile for Ollama, with what Ollama does not read from a GGUF file.

Ollama renders conversations with a Go template, not with the Jinja template in the file.  It is derived from
what the chat template writes around plain turns; where that is not enough, the template is omitted with a
note.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autosft.profiles.dataset.turn_end import turn_end

_TEXTS = {"system": "Sei kurz.", "user": "Wie geht es?", "assistant": "Gut, danke."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What a chat template writes around plain turns."""

    start: str  # before the first turn
    default_system: str  # used if there is no system message
    around: Mapping[str, tuple[str, str]]  # before and after a role's content
    prompt: str  # before an answer

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render like the Go template."""
        has_system = any(message["role"] == "system" for message in messages)
        said = [self.start + ("" if has_system else self.default_system)]
        for message in messages:
            before, after = self.around[message["role"]]
            said.append(before + message["content"] + after)
        return "".join(said) + self.prompt

    def as_go(self) -> str:
        """Return Ollama's TEMPLATE."""
        roles = list(self.around)
        branches = "".join(
            f'{{{{ {"if" if role == roles[0] else "else if"} eq .Role "{role}" }}}}'
            f"{before}{{{{ .Content }}}}{after}"
            for role, (before, after) in self.around.items()
        )
        default = f"{{{{ if not .System }}}}{self.default_system}{{{{ end }}}}" if self.default_system else ""
        return (
            f"{self.start}{default}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{self.prompt}"
        )


def modelfile(tokenizer: Any, generation: Any, file_name: str) -> tuple[str, list[str]]:
    """Return the text of a Modelfile for a GGUF file in the same folder, and notes on it."""
    lines, notes = [f"FROM ./{file_name}"], []
    turns = turns_of(tokenizer)
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.as_go()}"""')
    elif tokenizer.chat_template:
        notes.append(
            "Modelfile: the chat template writes plain turns in a way that has no TEMPLATE of Ollama's here; "
            "Ollama then guesses one.  llama-server uses the template in the file."
        )
    end = turn_end(tokenizer, generation)
    stops = [tokenizer.convert_ids_to_tokens(number) for number in end.token_ids]
    for stop in dict.fromkeys([*stops, *([end.text] if end.text else [])]):
        lines.append(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}")
    lines.extend(f"PARAMETER {name} {value:g}" for name, value in _sampling(generation).items())
    return "\n".join(lines) + "\n", notes


def _sampling(generation: Any) -> dict[str, float]:
    """Return the sampling settings of a model's folder; greedy decoding is temperature zero."""
    if generation is None:
        return {}
    if generation.do_sample is False:
        return {"temperature": 0}
    values = {name: getattr(generation, name, None) for name in ("temperature", "top_p", "top_k")}
    values["repeat_penalty"] = getattr(generation, "repetition_penalty", None)
    return {name: float(value) for name, value in values.items() if value is not None}


def turns_of(tokenizer: Any) -> Turns | None:
    """Return what is written around turns; None if plain conversations are not rendered the same with it."""
    if not tokenizer.chat_template:
        return None
    try:
        return _turns_of(tokenizer)
    except Exception:
        return None


def _turns_of(tokenizer: Any) -> Turns | None:
    user, answer = _message("user"), _message("assistant")
    alone = _render(tokenizer, [user], prompt=False)
    asked = _render(tokenizer, [user], prompt=True)
    twice = _render(tokenizer, [user, answer, user], prompt=False)
    before_all, after_user = alone.split(_TEXTS["user"])
    between_questions = twice[len(before_all) :].split(_TEXTS["user"])[1]
    before_answer, between = between_questions.removeprefix(after_user).split(_TEXTS["assistant"])
    prompt = asked.removeprefix(alone)
    # The boundary between an answer's end and a question's start is ambiguous.
    beginnings = [between.removeprefix(after_user), _common_end(before_all, between, tokenizer)]
    for before_user in dict.fromkeys(beginnings):
        around = {
            "user": (before_user, after_user),
            "assistant": (before_answer, between.removesuffix(before_user)),
        }
        turns = _with_system(tokenizer, before_all.removesuffix(before_user), around, prompt)
        if _is_right(turns, tokenizer):
            return _without_bos(turns, tokenizer)
    return None


def _with_system(tokenizer: Any, start: str, around: Mapping[str, tuple[str, str]], prompt: str) -> Turns:
    """Add what is written around a system message; any other text before it is the default system prompt."""
    found = _system(tokenizer, _message("user"), around["user"][0])
    if found is None:
        return Turns(start=start, default_system="", around=around, prompt=prompt)
    before, after = found
    bos = tokenizer.bos_token or ""
    opens_turns = bool(bos) and bos in around["user"][0]  # as SmolLM's <|im_start|>
    first = bos if bos and not opens_turns and before.startswith(bos) and start.startswith(bos) else ""
    return Turns(
        start=first,
        default_system=start.removeprefix(first),
        around={"system": (before.removeprefix(first), after), **around},
        prompt=prompt,
    )


def _is_right(turns: Turns, tokenizer: Any) -> bool:
    """Return whether plain conversations equal the chat template's, in text that a Modelfile can hold."""
    user, answer = _message("user"), _message("assistant")
    cases = [[user], [user, answer, user]]
    if "system" in turns.around:
        cases.append([_message("system"), user, answer, user])
    pieces = [
        turns.start,
        turns.default_system,
        turns.prompt,
        *(part for pair in turns.around.values() for part in pair),
    ]
    is_plain = not any(mark in "".join(pieces) for mark in ("{{", '"""'))
    return is_plain and all(turns.render(case) == _render(tokenizer, case, prompt=True) for case in cases)


def _system(tokenizer: Any, user: Mapping[str, str], before_user: str) -> tuple[str, str] | None:
    try:
        text = _render(tokenizer, [_message("system"), user], prompt=False)
        before, rest = text.split(_TEXTS["system"])
    except Exception:
        return None
    after, found, _ = rest.partition(before_user + _TEXTS["user"])
    return (before, after) if found else None


def _without_bos(turns: Turns, tokenizer: Any) -> Turns:
    """Remove the first token, which Ollama, like llama.cpp, adds itself if the tokenizer does."""
    bos = tokenizer.bos_token or ""
    adds = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if not adds or not turns.start.startswith(bos):
        return turns
    return Turns(
        start=turns.start.removeprefix(bos),
        default_system=turns.default_system,
        around=turns.around,
        prompt=turns.prompt,
    )


def _common_end(first: str, second: str, tokenizer: Any) -> str:
    """Return the longest common suffix that does not begin inside a special token."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    number = 0
    while number < min(len(first), len(second)) and first[-1 - number] == second[-1 - number]:
        number += 1
    while number and any(_is_inside(text, len(text) - number, special) for text in (first, second)):
        number -= 1
    return first[len(first) - number :]


def _is_inside(text: str, place: int, tokens: Sequence[str]) -> bool:
    """Return whether a position in a text is inside one of the tokens."""
    return any(
        token in text[max(0, place - len(token) + 1) : place + len(token) - 1]
        for token in tokens
        if len(token) > 1
    )


def _message(role: str) -> dict[str, str]:
    return {"role": role, "content": _TEXTS[role]}


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=prompt, tokenize=False))
