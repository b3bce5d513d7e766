from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from autosft.profiles.dataset.hub import hub_answers
from tests.profiles.dataset.small_tokenizer import facts_of, make_tokenizer, tokenizer_for


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_answers.cache_clear()


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder with nothing but a tokenizer that has the Qwen 2.5 chat template."""
    folder = tmp_path_factory.mktemp("model") / "chat"
    tokenizer_for(facts_of("Qwen 2.5")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("model") / "plain"
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    """Write a file below the test's folder and return its path."""

    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
