"""Calling a function in a process of its own: its result, its failure, its death."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from autosft.workers.processes.starters import ColdStarter, Starter, WarmServer, call

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks")]


@pytest.fixture(scope="module", params=["forked", "spawned"])
def starter(request: pytest.FixtureRequest) -> Iterator[Starter]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        made: Starter = WarmServer(imports=["json"]) if request.param == "forked" else ColdStarter()
        yield made
        made.close()


def test_returns_what_the_function_returns(starter: Starter, tmp_path: Path) -> None:
    done = call(starter, "json:loads", {"s": '{"a": [1, 2]}'}, num_threads=1, log=tmp_path / "log")
    assert done == {"a": [1, 2]}


def test_an_exception_names_its_message_and_the_log(starter: Starter, tmp_path: Path) -> None:
    log = tmp_path / "folder" / "log"
    with pytest.raises(ChildProcessError, match=r"JSONDecodeError: Expecting property.*log is .*folder/log"):
        call(starter, "json:loads", {"s": "{"}, num_threads=1, log=log)
    assert "Traceback" in log.read_text()


def test_a_process_that_dies_is_told(starter: Starter, tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="ended without a result"):
        call(starter, "os:_exit", {"status": 3}, num_threads=1, log=tmp_path / "log")
