"""Bounds of what a chat template may take, as code of whoever made the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from autosft.profiles.bounded_work import TooMuchWorkError, bounded_ram, bounded_time
from autosft.profiles.units import gib

#: What rendering one conversation may take.
RENDERING_S = 5.0
RENDERING_BYTES = 1 << 30
REMEDY = "Correct chat_template.jinja or tokenizer_config.json in the model's folder."


@contextlib.contextmanager
def bounded_template() -> Iterator[None]:
    """Bound what a template may take to render one conversation.  Raises TooMuchWorkError.

    It is code of whoever made the model: the sandbox bounds what it reaches, not how long it runs.
    """
    what = "rendering a conversation by the chat template"
    try:
        with bounded_time(RENDERING_S, what=what, remedy=REMEDY), bounded_ram(RENDERING_BYTES):
            yield
    except MemoryError as error:
        raise TooMuchWorkError(f"{what} takes more than {gib(RENDERING_BYTES)}.", remedy=REMEDY) from error
