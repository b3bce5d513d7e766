"""The documents: the Chinese README is kept in step, and every command that is shown exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from autosft.workers.processes.memory_limit import with_room

ROOT = Path(__file__).parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
FROZEN = (ROOT / "tests/cli/command_line.txt").read_text(encoding="utf-8").splitlines()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def shown(document: Path) -> list[str]:
    """Return what stands in code: indented lines without their comments, and spans in back quotes."""
    text = document.read_text(encoding="utf-8")
    # A command goes on where a line ends with a backslash.
    lines = re.findall(r"^ {4,}(\S.*)$", text.replace("\\\n", " "), flags=re.M)
    blocks = [re.split(r"\s+#\s", line)[0].rstrip() for line in lines]
    prose = re.sub(r"^ {4,}\S.*$", "", text, flags=re.M)
    return blocks + re.findall(r"`([^`]+)`", prose)


def links(document: Path) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8"))


def test_the_chinese_readme_shows_what_the_english_one_shows() -> None:
    assert shown(CHINESE) == shown(README)
    assert [link for link in links(CHINESE) if link != README.name] == [
        link for link in links(README) if link != CHINESE.name
    ]
    headings = [
        re.findall(r"^#+ ", item.read_text(encoding="utf-8"), flags=re.M) for item in (README, CHINESE)
    ]
    assert headings[0] == headings[1]


def commands(document: Path) -> list[list[str]]:
    """Return the commands of ours that a document shows, in words."""
    found = []
    for code in shown(document):
        match = re.match(r"(?:\S+=\S+ )*(?:\.venv/bin/)?autosft (.+)", code)
        if match and not match[1].startswith("["):
            words = shlex.split(re.split(r" {3,}", match[1])[0])
            if re.fullmatch(r"[a-z][a-z-]*", words[0]):
                found.append(words)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda item: item.name)
def test_every_command_and_flag_that_is_shown_exists(document: Path) -> None:
    names = {line.split(" ")[0] for line in FROZEN}
    for words in commands(document):
        assert words[0] in names, f"{document.name}: autosft {' '.join(words)}"
        own = [line for line in FROZEN if line.startswith(f"{words[0]} ")]
        for word in words[1:]:
            if word.startswith("--"):
                flag = word.partition("=")[0]
                if words[0] == "submit":
                    continue  # the rest is another command
                assert any(line.endswith(f" {flag}") for line in own), (
                    f"{document.name}: autosft {' '.join(words)}: {flag}"
                )


def test_the_memory_page_says_the_limit_that_a_cpu_trial_runs_under() -> None:
    text = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    assert f"**the upper bound, a tenth of it and {with_room(0) >> 20} MiB**" in text
    assert with_room(1000) - with_room(0) == 1100


def test_every_link_into_a_page_finds_its_heading() -> None:
    for document in DOCUMENTS:
        for link in links(document):
            path, _, anchor = link.partition("#")
            if not anchor or "://" in link:
                continue
            page = (document.parent / path if path else document).read_text(encoding="utf-8")
            headings = [
                re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
                for heading in re.findall(r"^#+ (.+)$", page, flags=re.M)
            ]
            assert anchor in headings, f"{document.name}: {link}"
