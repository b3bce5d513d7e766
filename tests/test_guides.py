"""The table of docs/guides.md: the command line takes every command in it, every test in it is there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from autosft.cli import main, module_name
from autosft.commands.flags import as_request_fields, searched_names
from autosft.studies.request import TuneRequest, read_request
from tests.cli.chat_model import make_chat_model, write_chats
from tests.cli.pruned_llama import make_pruned_llama

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/guides.md").read_text(encoding="utf-8")


def statements() -> list[list[str]]:
    """Return the rows of the tables of what the guides say."""
    rows, is_inside = [], False
    for line in TEXT.splitlines():
        if not is_inside or not line.startswith("| "):
            is_inside = line.startswith("| the guide says") or (is_inside and line.startswith("|-"))
        else:
            rows.append([cell.strip() for cell in line.strip("| ").split(" | ")])
    return rows


ROWS = statements()
SPANS = [code for row in ROWS for code in re.findall(r"`([^`]+)`", " | ".join(row))]
BLOCKS = [line.strip() for line in re.findall(r"^ {4}(autosft .+)$", TEXT.replace("\\\n", " "), flags=re.M)]
COMMANDS = sorted(
    {
        match[1]
        for code in (*SPANS, *BLOCKS)
        if (match := re.fullmatch(r"(?:[A-Z_]+=\S+ )?autosft (.+)", re.sub(r"\s+", " ", code)))
    }
)


def test_each_statement_has_what_does_it_and_how_that_was_seen() -> None:
    assert len(ROWS) >= 36
    for row in ROWS:
        assert len(row) == 3, row
        said, does, run = row
        assert said
        assert does
        seen = re.search(r"`[^`]*autosft [^`]*`|tests/|the same", run)
        assert seen or "Nothing was tested" in does, row


def test_every_test_that_is_named_is_there() -> None:
    for named in re.findall(r"tests/[\w/]+\.py", TEXT):
        assert (ROOT / named).is_file(), named


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_taken(line: str) -> None:
    """Parsed as the command line does it; what a study is asked for is also checked as a request."""
    name, *words = shlex.split(line)
    command = get_command(importlib.import_module(module_name(name)).app)
    inner = getattr(command, "commands", None)
    if inner:
        command, words = inner[words[0]], words[1:]
    context = command.make_context(f"autosft {line}", words)
    if name == "tune":
        given = {*TuneRequest.model_fields, *searched_names()} & context.params.keys()
        request = read_request(as_request_fields({item: context.params[item] for item in given}), None)
        assert request.dimensions() is not None


QUICK = {
    "check-sparsity ./llama-pruned": "0.2000 of 14 pruned matrices are zero (blocks of 16x16)",
    "data show chats.json --model ./smol --max-rounds 2": "later rounds are left out of 20 of 60",
    "doctor": "RAM",
}


@pytest.mark.parametrize("line", QUICK)
def test_the_quick_ones_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in COMMANDS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if "llama" in line:
        make_pruned_llama(tmp_path / "llama-pruned", ["one two three four"])
    if "smol" in line:
        make_chat_model(tmp_path / "smol")
        write_chats(tmp_path / "chats.json")
    assert main(shlex.split(line)) in (0, 1)
    assert QUICK[line] in " ".join(capsys.readouterr().out.split())
