"""What comes from data, files and models is shown on the terminal, and never acts there."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from autosft import cli
from autosft.commands.chat import show
from autosft.commands.data import sample_text
from autosft.commands.options import write_json
from autosft.ui.terminal import guarded_output, json_visible, new_console, visible

ROOT = Path(__file__).parents[3]

ACTING: list[tuple[str, str]] = [
    ("\x1b[2J", r"\x1b[2J"),
    ("\x1b]8;;http://x\x07", r"\x1b]8;;http://x\x07"),
    ("a\rb", r"a\x0db"),
    ("a\x08b", r"a\x08b"),
    ("\x00", r"\x00"),
    ("\x7f", r"\x7f"),
    ("\x9b2J", r"\x9b2J"),
    ("\u202eevil", r"\u202eevil"),
    ("\u2066x\u2069", r"\u2066x\u2069"),
    ("\udcff", r"\udcff"),
    ("a\tb\nc", "a\tb\nc"),
    ("日本 🙂 \u200f עברית", "日本 🙂 \u200f עברית"),
]


@pytest.mark.parametrize(("text", "shown"), ACTING, ids=[shown for _, shown in ACTING])
def test_what_would_act_is_written_visibly(capsys: pytest.CaptureFixture[str], text: str, shown: str) -> None:
    stream = io.StringIO()
    new_console(stream=stream, width=200).print(text)
    with guarded_output():
        print(text)
        sys.stderr.write(text)

    assert visible(text) == shown
    assert capsys.readouterr() == (shown + "\n", shown)
    assert (
        re.sub(r"\s+", " ", shown).strip() in re.sub(r"\s+", " ", stream.getvalue()) or "\x08" in text + "\r"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "ascii:strict"])
def test_an_encoding_that_lacks_a_letter_costs_the_letter_and_not_the_study(encoding: str) -> None:
    program = (
        "from autosft.ui.terminal import guarded_output\n"
        "import sys\n"
        "with guarded_output():\n"
        "    print('gain 0.12 ± 0.03, 日本'); print('done ±', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert b"gain 0.12" in done.stdout
    assert rb"\u65e5\u672c" in done.stdout
    assert b"done" in done.stderr


@pytest.mark.parametrize("text", [text for text, _ in ACTING])
def test_json_means_the_same(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with guarded_output():
        write_json({text: [text]})
    written = capsys.readouterr().out

    assert json.loads(written) == {text: [text]}
    assert visible(written) == written
    assert json_visible('"a\\n"') == '"a\\n"'


def test_colours_and_frames_of_the_console_pass() -> None:
    from rich.table import Table
    from rich.text import Text

    stream = io.StringIO()
    console = new_console(stream=stream, force_terminal=True, color_system="standard", width=80)
    table = Table("name\x1b[31m")
    table.add_row("red\x1b[2J", style="red")
    console.print(table)
    console.print(Text("red\x1b[2J", style="red"))
    console.print("[bold]not bold[/] :smile:")
    written = stream.getvalue()

    assert "\x1b[2J" not in written
    assert written.count(r"red\x1b[2J") == 2
    assert re.search(r"\x1b\[[0-9;]*31m", written)
    assert "[bold]not bold[/] :smile:" in written


@pytest.mark.parametrize("has_colour", [True, False])
def test_samples_and_answers(has_colour: bool) -> None:
    stream = io.StringIO()
    console = new_console(stream=stream, force_terminal=has_colour, color_system="standard", width=100)
    console.print(sample_text((("a\x1b[2J\r", False), ("b\x1b]0;x\x07", True)), has_colour=has_colour))
    show(console, "p\x1b[2J", [("x\x1b[2J", "y\x1b[2J\r"), ("z", "")], quiet=False)
    show(console, "p\x1b[2J", [("x\x1b[2J", "y\x1b[2J\r")], quiet=True)
    written = stream.getvalue()

    assert "\x1b[2J" not in written
    assert "\x1b]" not in written
    assert "\r" not in written
    assert written.count(r"\x1b[2J") >= 6


@pytest.mark.parametrize(
    "arguments",
    [
        ["x\x1b[2J"],
        ["data", "show", "no\x1b[2J.jsonl", "--model", "m"],
        ["tune", "--config", "no\x1b[2J.yaml"],
        ["tune", "--model", "m", "--data", "d", "--method", "\x1b[2J"],
    ],
    ids=lambda arguments: arguments[0].encode().hex()[:6],
)
def test_errors_name_what_was_given_visibly(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) != 0
    written = "".join(capfd.readouterr())

    assert "\x1b" not in written
    assert r"\x1b[2J" in written


def test_an_error_is_short_whatever_it_names(capfd: pytest.CaptureFixture[str]) -> None:
    cli.main(["data", "show", "x" * 100_000, "--model", "m"])

    assert len(capfd.readouterr().err) < 5000


def test_nobody_makes_a_console_of_their_own() -> None:
    """Every console comes from `new_console`, which alone knows the stream behind the guarded one."""
    made = re.compile(r"(?<![\w.])Console\(")
    places = [
        str(path.relative_to(ROOT))
        for folder in ("autosft", "profiles", "scheduler", "studies", "workers")
        for path in (ROOT / folder).rglob("*.py")
        if made.search(path.read_text(encoding="utf-8"))
    ]
    assert places == []


def test_bars_draw_in_a_terminal_whose_texts_are_guarded() -> None:
    """They once wrote each return of the carriage as an escape, one state of the bar after another."""
    pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
    termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")
    program = (
        "from autosft.profiles.progress_bar import progress_bar\n"
        "from autosft.ui.terminal import guarded_output, share_bar\n"
        "with guarded_output():\n"
        "    with share_bar('answers \\x1b[31m', is_quiet=False) as tell: tell(0.5)\n"
        "    with progress_bar(total=2, unit=' batches', mininterval=0) as bar: bar.update()\n"
        "    with progress_bar(is_quiet=True, total=7) as bar: bar.update()\n"
    )
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    subprocess.run([sys.executable, "-c", program], stderr=follower, check=True, cwd=ROOT.parent)
    drawn = os.read(leader, 1 << 16).decode()
    os.close(follower)
    os.close(leader)

    assert r"answers \x1b[31m" in drawn
    assert "0 % |" in drawn
    assert "1/2" in drawn
    assert "/7" not in drawn
    assert r"\x0d" not in drawn


def test_nobody_makes_a_bar_of_their_own() -> None:
    """Every bar comes from `progress_bar`, for the same reason."""
    made = re.compile(r"(?<![\w.])tqdm\(")
    places = {
        str(path.relative_to(ROOT))
        for folder in ("autosft", "profiles", "scheduler", "service", "studies", "workers")
        for path in (ROOT / folder).rglob("*.py")
        if made.search(path.read_text(encoding="utf-8"))
    }
    assert places == {"profiles/progress_bar.py"}
