"""Unfinished files of an export are removed: by the export itself, at SIGTERM too, or by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler.finish.export import make_folder
from autosft.workers.tools.scratch import LOCK, PREFIXES, scratch_folder, sweep

#: A tool that begins to write into a folder, says so, and takes its time.
TOOL = """
import signal, sys
from pathlib import Path
from autosft.workers.tools.scratch import scratch_folder, stopped_by_signals
with stopped_by_signals(), scratch_folder(Path(sys.argv[1]), ".converting-") as inside:
    (inside / "half").touch()
    signal.pause()
"""
#: A command that runs it.
COMMAND = """
import sys
from autosft.workers.tools.merge_process import run_tool
from autosft.workers.tools.scratch import stopped_by_signals
with stopped_by_signals():
    run_tool("slow_tool", sys.argv[1], failure="it failed")
"""


def begun(arguments: list[str], output: Path) -> subprocess.Popen[bytes]:
    """Start a process that writes into `output`, and wait until it does."""
    output.mkdir()
    tools = output.parent / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "slow_tool.py").write_text(TOOL)
    process = subprocess.Popen(
        [sys.executable, *arguments, str(output)],
        env={**os.environ, "PYTHONPATH": str(tools)},
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: any(output.glob(".converting-*/inside/half")))
    return process


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_ends_the_command_and_its_tool_and_leaves_nothing(tmp_path: Path) -> None:
    with begun(["-c", COMMAND], tmp_path / "out") as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) in (-signal.SIGINT, 130)
    assert not any((tmp_path / "out").iterdir())


def test_what_a_killed_export_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with begun(["-m", "slow_tool"], output) as process:
        sweep(output)
        assert any(output.iterdir()), "it is in use"
        with pytest.raises(UserError, match="is not empty"):
            make_folder(output, must_be_empty=True)
        process.kill()
    make_folder(output, must_be_empty=True)
    assert not any(output.iterdir())


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch_folder(tmp_path, ".merged-") as inside:
            (inside / "half").touch()
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        fail()
    assert not any(tmp_path.iterdir())


def folder_without_lock(output: Path) -> None:
    (output / f"{PREFIXES[0]}abc").mkdir()


def link_to_a_folder(output: Path) -> None:
    theirs = output.parent / "theirs"
    theirs.mkdir()
    (theirs / LOCK).touch()
    (output / f"{PREFIXES[1]}abc").symlink_to(theirs)


def folder_with_a_link_for_a_lock(output: Path) -> None:
    (output.parent / "theirs").touch()
    (output / f"{PREFIXES[2]}abc").mkdir()
    (output / f"{PREFIXES[2]}abc" / LOCK).symlink_to(output.parent / "theirs")


def another_name(output: Path) -> None:
    (output / "model").mkdir()
    (output / "model" / LOCK).touch()


def file(output: Path) -> None:
    (output / f"{PREFIXES[0]}notes").write_text("mine")


@pytest.mark.parametrize(
    "make",
    [folder_without_lock, link_to_a_folder, folder_with_a_link_for_a_lock, another_name, file],
    ids=lambda make: make.__name__,
)
def test_what_is_not_ours_stays(make: Callable[[Path], None], tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    make(output)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    sweep(output)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
