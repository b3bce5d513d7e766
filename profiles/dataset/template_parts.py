"""Adapt chat templates that accept only content in parts, as those of many vision-language models do.

SmolVLM's, LLaVA's and Idefics's templates iterate over `message["content"]` and render parts of type "text";
plain text is not rendered.  Such a template is given parts, and saved unchanged.
"""

from __future__ import annotations

import functools
from typing import Any

from autosft.profiles.bounded_work import TooMuchWorkError
from autosft.profiles.dataset.template_bounds import bounded_template

_USER, _ANSWER = "autosftprobe0", "autosftprobe2"

#: Converts the text of all turns to parts, before the template begins.
_PREFIX = (
    "{%- set autosft_turns = namespace(listed=[]) -%}"
    "{%- for turn in messages -%}"
    "{%- set parts = [{'type': 'text', 'text': turn['content'] if turn['content'] is string else ''}] -%}"
    "{%- set whole = turn['content'] is defined and turn['content'] is not string"
    " and turn['content'] is not none -%}"
    "{%- set autosft_turns.listed = autosft_turns.listed + [turn if whole else dict(turn, content=parts)] -%}"
    "{%- endfor -%}"
    "{%- set messages = autosft_turns.listed -%}\n"
)


def with_parts(jinja: str, special_tokens: dict[str, Any]) -> str:
    """Return a template that accepts content as text; the same one if it does already.

    Raises TooMuchWorkError for one that takes too much.
    """
    return jinja if _takes_text(jinja, tuple(sorted(_texts(special_tokens).items()))) else _PREFIX + jinja


@functools.lru_cache(maxsize=32)
def _takes_text(jinja: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Return whether a template renders plain text, or renders neither text nor parts."""
    given = dict(special_tokens)
    return _shows(jinja, given) or not _shows(_PREFIX + jinja, given)


def _shows(jinja: str, special_tokens: dict[str, str]) -> bool:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    try:
        with bounded_template():
            texts, _ = render_jinja_template(conversations=[turns], chat_template=jinja, **special_tokens)
    except TooMuchWorkError:
        raise
    except (TemplateError, TypeError, ValueError, KeyError):
        return False
    text = str(texts[0])
    return 0 <= text.find(_USER) < text.find(_ANSWER)


def _texts(special_tokens: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in special_tokens.items() if isinstance(value, str)}
