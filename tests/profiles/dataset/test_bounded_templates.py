"""A chat template is code of whoever made the model: it takes neither for ever nor all RAM."""

from __future__ import annotations

import resource
import signal
import sys
import time
from typing import Any

import pytest

from autosft.profiles.dataset import template_bounds
from autosft.profiles.dataset.template import RenderError, chat_template
from autosft.profiles.errors import UserError
from tests.profiles.dataset.small_tokenizer import make_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits processor time and the data segment")

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LARGE = "{% set x = 'x' * 4000000000 %}"
#: Only where there is a system turn: the probe of a question and its answer is rendered.
LATER = "{% if messages[0].role == 'system' %}" + LONG + "{% endif %}"


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(template_bounds, "RENDERING_S", 0.2)
    return make_tokenizer()


@pytest.mark.parametrize(
    ("evil", "says"), [(LONG, r"takes more than 0\.2 s"), (LARGE, r"takes more than 1\.0 GiB")]
)
def test_a_template_that_takes_too_much_is_refused_in_words(tokenizer: Any, evil: str, says: str) -> None:
    handler = signal.getsignal(signal.SIGVTALRM)
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    tokenizer.chat_template = TURNS + evil
    started = time.process_time()
    with pytest.raises(UserError, match=says):
        chat_template(tokenizer, "theirs")
    assert time.process_time() - started < 5.0
    assert signal.getsignal(signal.SIGVTALRM) == handler
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_so_is_one_that_does_so_for_some_conversations(tokenizer: Any) -> None:
    tokenizer.chat_template = TURNS + LATER
    found = chat_template(tokenizer, "theirs")
    assert not found.renders_system
    with pytest.raises(RenderError, match="takes more than"):
        found.render([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])


def test_a_template_that_takes_little_is_rendered(tokenizer: Any) -> None:
    tokenizer.chat_template = TURNS
    text, _ = chat_template(tokenizer, "theirs").render([{"role": "user", "content": "Hi"}])
    assert text == "user: Hi\n"
