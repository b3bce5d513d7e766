"""AGENTS.md stays true: its commands run, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    \.venv/bin/(.+)$", TEXT, flags=re.M)
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str) -> None:
    program, *arguments = command.split()
    here = Path(sys.executable).with_name(program)
    ended = subprocess.run([here, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("text", [TEXT, CONTRIBUTING], ids=["AGENTS", "CONTRIBUTING"])
def test_what_is_named_is_there(text: str) -> None:
    paths = re.findall(
        r"`((?:autosft|benchmarks|docs|profiles|scheduler|studies|tests|workers)/[\w./-]*)`", text
    )
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.M), f"make {target}"


def test_the_layout_is_the_packages() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rows = dict(re.findall(r"^\| `(\w+)/` \| `(autosft[\w.]*)` \|", TEXT, flags=re.M))
    assert rows == {folder: package for package, folder in setup["package-dir"].items()}


ROWS = {
    "studies/metrics.py": "METRICS",
    "studies/search/settings.py": "SETTINGS",
    "studies/export/formats.py": "FORMATS",
    "workers/device.py": "TrialDevice",
    "profiles/model/adapters.py": "KINDS",
}


@pytest.mark.parametrize("file", ROWS)
def test_the_places_to_add_things_are_where_contributing_says(file: str) -> None:
    assert f"`{file}`" in CONTRIBUTING
    assert f"`{ROWS[file]}`" in CONTRIBUTING
    assert re.search(rf"^(class )?{ROWS[file]}\b", (ROOT / file).read_text(encoding="utf-8"), flags=re.M)
