"""The witness of the fault suite sees a second process of an item; a fork, or one after another, is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autosft.service.drivers import launch
from tests.faults import ran_once

ROOT = Path(__file__).parents[2]
RUN = "import os, pathlib, sys; from tests.faults import ran_once; ran_once.note(pathlib.Path(sys.argv[1]))"
STAY = RUN + "; print('runs', flush=True); sys.stdin.read()"
FORKED = (
    RUN + "; import os; pid = os.fork(); print('runs', flush=True); sys.stdin.read() if not pid else None"
)


def process(folder: Path, start: str, script: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), launch.LAUNCH: start},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("first", "starts", "complaint"),
    [
        pytest.param(STAY, ("a", "b"), "two processes at once", id="two at once"),
        pytest.param(STAY, ("a", "a"), "two processes at once", id="two of one start at once"),
        pytest.param(RUN, ("a", "b"), None, id="one after the other"),
        pytest.param(RUN, ("a", "a"), "two processes of one start", id="one start after the other"),
        pytest.param(FORKED, ("a", "b"), None, id="a fork that outlives the first"),
    ],
)
def test_a_second_process_is_seen(
    tmp_path: Path, first: str, starts: tuple[str, str], complaint: str | None
) -> None:
    before = process(tmp_path, starts[0], first)
    assert before.stdout is not None
    before.stdout.readline()
    if first != STAY:
        before.wait(60)
    assert process(tmp_path, starts[1], RUN).wait(60) == 0
    assert before.stdin is not None
    before.stdin.close()
    before.wait(60)
    if complaint is None:
        assert ran_once.check(tmp_path) == 2
        return
    with pytest.raises(AssertionError, match=complaint):
        ran_once.check(tmp_path)
