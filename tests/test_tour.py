"""Every command of docs/tour.md, in its order, with a small model in the place of the real one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from autosft import cli
from tests.cli.chat_model import make_chat_model, write_chats

TOUR = Path(__file__).parents[1] / "docs" / "tour.md"


def commands() -> list[list[str]]:
    """Return the commands of the page in words, without the program's name."""
    shown = re.findall(r"^    \$ autosft (.+)$", TOUR.read_text(encoding="utf-8"), flags=re.M)
    return [shlex.split(line) for line in shown]


def test_the_page_shows_both_journeys() -> None:
    names = [words[0] for words in commands()]
    assert names[:4] == ["plan", "tune", "studies", "report"]
    assert {"data", "evaluate", "chat"} < set(names)


@pytest.mark.ray
@pytest.mark.slow
def test_every_command_of_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CACHE", "DATA"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    model = make_chat_model(tmp_path / "model")
    for name in ("chats.jsonl", "held.jsonl"):
        write_chats(tmp_path / name)
    for words in commands():
        small = [str(model) if word == "smol.gguf" else word for word in words]
        assert cli.main(small) == 0, shlex.join(small)
    assert (tmp_path / "tour.html").exists()
