"""A loss that needs more memory than predicted: fewer rows; and the cause, where no number of rows fits."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from autosft.cli import DONE, FAILED
from tests.cli.chat_model import make_chat_model, write_chats
from tests.cli.command import start

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

#: Where memory is limited as containers do; needs root and version 1 of control groups.
GROUPS = Path("/sys/fs/cgroup/memory")

#: Memory that no trace sees.  `empty` is address space alone, which a limit counts and the machine does not.
LOSS = """
import numpy
from pathlib import Path
from torch.nn.functional import cross_entropy

ROW_BYTES = int(Path(__file__).with_name("row_bytes").read_text())

def loss(outputs, labels, num_items_in_batch=None):
    held = [numpy.{make}(ROW_BYTES, dtype=numpy.uint8) for _ in range(len(labels))]
    logits = outputs.logits[:, :-1].flatten(0, 1)
    summed = cross_entropy(logits.float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    del held
    return summed / num_items_in_batch
"""


def test_a_study_whose_every_rung_runs_out_fails_with_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hungry_loss.py").write_text(LOSS.format(make="empty"))
    (tmp_path / "row_bytes").write_text(str(2 * psutil.virtual_memory().available))
    monkeypatch.chdir(tmp_path)
    with tune(tmp_path) as process:
        output, errors = process.communicate(timeout=840)
    assert process.returncode == FAILED, (output, errors)
    assert "memory" in errors
    assert json.loads(output.splitlines()[-1])["best_trial"] is None


def tune(folder: Path) -> subprocess.Popen[str]:
    model, data = make_chat_model(folder / "model"), write_chats(folder / "chats.jsonl")
    return start(
        folder,
        *("tune", "--model", str(model), "--data", str(data), "--loss", "hungry_loss:loss"),
        *("--study", "hungry", "--storage", f"sqlite:///{folder / 'studies.db'}", "--method", "full"),
        *("--trials", "2", "--epochs", "1", "--evaluations", "1", "--effective-batch-size", "8"),
        *("--learning-rate", "1e-5..1e-2 log", "--no-prune", "--hardware", "cpu", "--json"),
    )


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of our own."""
    if not os.access(GROUPS / "cgroup.procs", os.W_OK):
        pytest.skip(f"needs a control group that limits memory ({GROUPS})")
    folder = GROUPS / f"autosft-hungry-{os.getpid()}"
    folder.mkdir()
    yield folder
    deadline = time.monotonic() + 30
    while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    folder.rmdir()


@pytest.mark.parametrize(("row_mib", "limit_mib"), [(120, 2048), (300, 3072)])
def test_a_container_that_holds_some_rows_of_it_runs_the_study(
    row_mib: int, limit_mib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: Path
) -> None:
    """At all 8 rows even tracing it would take more than the container has: the kernel killed `tune`."""
    (group / "memory.limit_in_bytes").write_text(str(limit_mib << 20))
    (tmp_path / "hungry_loss.py").write_text(LOSS.format(make="ones"))
    (tmp_path / "row_bytes").write_text(str(row_mib << 20))
    monkeypatch.chdir(tmp_path)
    with tune(tmp_path) as process:
        (group / "cgroup.procs").write_text(str(process.pid))
        output, errors = process.communicate(timeout=840)
    assert process.returncode == DONE, (output[-2000:], errors[-2000:])
    assert json.loads(output.splitlines()[-1])["best_trial"] is not None
