"""A loss that needs more memory than there is, at every number of rows: the study fails with the cause."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from autosft.cli import FAILED
from tests.cli.chat_model import make_chat_model, write_chats
from tests.cli.command import start

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

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


def test_a_study_whose_every_rung_runs_out_fails_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hungry_loss.py").write_text(LOSS)
    (tmp_path / "row_bytes").write_text(str(2 * psutil.virtual_memory().available))
    model, data = make_chat_model(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    with start(
        tmp_path,
        *("tune", "--model", str(model), "--data", str(data), "--loss", "hungry_loss:loss"),
        *("--study", "hungry", "--storage", f"sqlite:///{tmp_path / 'studies.db'}", "--method", "full"),
        *("--trials", "2", "--epochs", "1", "--evaluations", "1", "--effective-batch-size", "8"),
        *("--learning-rate", "1e-5..1e-2 log", "--no-prune", "--hardware", "cpu", "--json"),
    ) as process:
        output, errors = process.communicate(timeout=840)
    assert process.returncode == FAILED, (output, errors)
    assert "memory" in errors
    assert json.loads(output.splitlines()[-1])["best_trial"] is None
