"""A loss that needs far more memory than predicted: fewer rows until it fits, and later trials know it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from autosft.cli import DONE, FAILED
from autosft.studies.store.records import open_records
from autosft.studies.trial import FailureKind, TrialState
from tests.cli.chat_model import make_chat_model, write_chats
from tests.cli.command import read_json, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

#: Address space that no trace sees and nothing touches: a limit counts it, and the machine does not.
LOSS = """
import numpy
from pathlib import Path
from torch.nn.functional import cross_entropy

ROW_BYTES = int(Path(__file__).with_name("row_bytes").read_text())

def loss(outputs, labels, num_items_in_batch=None):
    held = [numpy.empty(ROW_BYTES, dtype=numpy.uint8) for _ in range(len(labels))]
    logits = outputs.logits[:, :-1].flatten(0, 1)
    summed = cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    del held
    return summed / num_items_in_batch
"""


def tune(folder: Path, monkeypatch: pytest.MonkeyPatch, *, share: float) -> tuple[int, str, str]:
    """Run a study of two trials whose loss takes a share of the free memory for each row."""
    (folder / "hungry_loss.py").write_text(LOSS)
    (folder / "row_bytes").write_text(str(int(share * psutil.virtual_memory().available)))
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


def test_rows_are_halved_until_they_fit_and_the_next_trial_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, errors = tune(tmp_path, monkeypatch, share=0.6)
    assert code == DONE, errors
    assert read_json(output)[-1]["best_trial"] is not None
    with closing(open_records(f"sqlite:///{tmp_path / 'studies.db'}")) as records:
        study = records.read_study("hungry")
        assert [trial.state for trial in study.trials()] == [TrialState.COMPLETED] * 2
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
    first = [rows for trial, rows, _ in tried if trial == 0]
    assert first[0] > 1, tried
    assert first == sorted(set(first), reverse=True), f"each rung once, downwards: {tried}"
    assert first[-1] == 1
    out = FailureKind.OUT_OF_MEMORY.value
    assert {outcome for trial, rows, outcome in tried if trial == 0 and rows > 1} == {out}
    assert [rows for trial, rows, _ in tried if trial == 1] == [1], f"it began where the first ended: {tried}"


def test_a_study_whose_every_rung_runs_out_fails_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, errors = tune(tmp_path, monkeypatch, share=2.0)
    assert code == FAILED, (output, errors)
    assert "memory" in errors
    assert json.loads(output.splitlines()[-1])["best_trial"] is None
