"""A loss that needs far more memory than predicted: fewer rows until it fits, and later trials know it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from autosft.cli import DONE, FAILED
from autosft.studies.store.records import open_records
from autosft.studies.trial import FailureKind, TrialState
from tests.cli.chat_model import make_chat_model, write_chats
from tests.cli.command import read_json, start

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]  # minutes, and gigabytes for seconds

#: Memory that no trace sees.
LOSS = """
import numpy
from pathlib import Path
from torch.nn.functional import cross_entropy

ROW_BYTES = int(Path(__file__).with_name("row_bytes").read_text())

def loss(outputs, labels, num_items_in_batch=None):
    held = [numpy.empty(ROW_BYTES, dtype=numpy.uint8) for _ in range(len(labels))]
    if ROW_BYTES < 1 << 30:
        for row in held:
            row[::4096] = 1
    logits = outputs.logits[:, :-1].flatten(0, 1)
    summed = cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    del held
    return summed / num_items_in_batch
"""
#: Of a container in which the ladder is small enough for a shared machine.
CONTAINER_BYTES, ROW_BYTES = 5 << 30, 900 << 20


def tune(folder: Path, monkeypatch: pytest.MonkeyPatch, *, row_bytes: int) -> tuple[int, str, str]:
    """Run a study of two trials whose loss takes so much for each row."""
    (folder / "hungry_loss.py").write_text(LOSS)
    (folder / "row_bytes").write_text(str(row_bytes))
    model, data = make_chat_model(folder / "model"), write_chats(folder / "chats.jsonl")
    monkeypatch.chdir(folder)
    with start(
        folder,
        *("tune", "--model", str(model), "--data", str(data), "--loss", "hungry_loss:loss"),
        *("--study", "hungry", "--storage", f"sqlite:///{folder / 'studies.db'}", "--method", "full"),
        *("--trials", "2", "--epochs", "1", "--evaluations", "1", "--effective-batch-size", "8"),
        *("--learning-rate", "1e-5..1e-2 log", "--no-prune", "--hardware", "cpu", "--json"),
    ) as process:
        output, errors = process.communicate(timeout=840)
    return process.returncode, output, errors


@pytest.fixture
def container() -> Iterator[None]:
    """Run what this process starts in a control group with little memory (version 1, as root)."""
    found = re.search(r":memory:(.*)", Path("/proc/self/cgroup").read_text())
    here = Path(f"/sys/fs/cgroup/memory{found[1] if found else '/none'}")
    if not os.access(here / "cgroup.procs", os.W_OK):
        pytest.skip("needs a control group of memory that it may divide")
    group = here / f"autosft-test-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(CONTAINER_BYTES))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    yield
    deadline = time.monotonic() + 60
    while group.is_dir():
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (here / "cgroup.procs").write_text(pid)
        with contextlib.suppress(OSError):  # while processes of the run are still ending
            group.rmdir()
        assert time.monotonic() < deadline, "the control group stays in use"
        time.sleep(0.05)


@pytest.mark.usefixtures("container")
def test_rows_are_halved_until_they_fit_and_the_next_trial_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, errors = tune(tmp_path, monkeypatch, row_bytes=ROW_BYTES)
    assert code == DONE, errors
    assert read_json(output)[-1]["best_trial"] is not None
    with closing(open_records(f"sqlite:///{tmp_path / 'studies.db'}")) as records:
        study = records.read_study("hungry")
        states = [trial.state for trial in study.trials()]
        outcomes = {(attempt.trial, attempt.number): attempt.outcome for attempt in study.attempts()}
    tried = [
        (
            trial := event["record"]["number"],
            event["record"]["plan"]["micro_batch"],
            outcomes[trial, event["attempt"]],
        )
        for event in read_json(output)
        if event["event"] == "trial_started"
    ]
    assert states == [TrialState.COMPLETED] * 2, tried
    first = [rows for trial, rows, _ in tried if trial == 0]
    assert len(first) > 1, tried
    assert first == [first[0] >> rung for rung in range(len(first))], f"each rung once, downwards: {tried}"
    out = FailureKind.OUT_OF_MEMORY.value
    assert {outcome for trial, rows, outcome in tried if trial == 0 and rows > first[-1]} == {out}
    [second] = [rows for trial, rows, _ in tried if trial == 1]
    assert second <= first[-1], f"it began where the first ended: {tried}"


def test_a_study_whose_every_rung_runs_out_fails_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, errors = tune(tmp_path, monkeypatch, row_bytes=2 * psutil.virtual_memory().available)
    assert code == FAILED, (output, errors)
    assert "memory" in errors
    assert json.loads(output.splitlines()[-1])["best_trial"] is None
