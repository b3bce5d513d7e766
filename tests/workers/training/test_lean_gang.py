"""Optimizers that hold weights and moments in fewer bits, on two devices over gloo: equal replicas."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from autosft.profiles.recipe import Precision
from autosft.studies.trial import StopReason
from autosft.workers.processes.starters import WarmServer
from tests.optimizer_packages import environment, run_again_with_them
from tests.workers import small
from tests.workers.training.test_gang import assert_same, curve, job_for, run, weights

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks")]

#: Optimizer, precision, and whether a run by one process is compared, within what bf16 and 8 bits round.
LEAN = [
    ("adamw_torch_8bit", Precision.BF16_STOCHASTIC, True),
    ("adamw_torch_4bit", Precision.BF16_STOCHASTIC, False),
    ("adamw_8bit", Precision.FP32, False),
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WarmServer]:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    warm = WarmServer()
    yield warm
    warm.close()


@pytest.mark.parametrize(("optimizer", "precision", "is_compared"), LEAN, ids=[name for name, *_ in LEAN])
def test_replicas_step_alike_and_go_on_where_they_were_stopped(
    optimizer: str, precision: Precision, is_compared: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if find_spec("torchao") is None:
        run_again_with_them(request)
        return
    server: WarmServer = request.getfixturevalue("server")
    model, data = small.make_model(tmp_path / "model"), small.make_data(tmp_path)
    asked = {
        "pinned": small.pinned(data, precision=precision),
        "settings": small.settings(optimizer=optimizer),
    }
    both, end = run(server, job_for("DDP, accumulated", model, data, tmp_path / "2", **asked))
    assert end.completed, end.message
    if is_compared:
        alone, end = run(server, job_for("one process", model, data, tmp_path / "1", **asked))
        assert end.completed, end.message
        assert_same(alone, both, rel=4e-2)

    parts, end = run(server, job_for("DDP, accumulated", model, data, tmp_path / "3", **asked), stop_after=3)
    assert end.stopped is StopReason.SHUTDOWN
    # Both ranks load what rank 0 saved: a rank that had stepped otherwise would go on differently.
    resumed = {**asked, "attempt": 2, "resume_from": parts[-1].checkpoint}
    rest, end = run(server, job_for("DDP, accumulated", model, data, tmp_path / "3", **resumed))
    assert end.completed, end.message
    assert curve(parts + rest) == curve(both)
    expected, found = weights(both), weights(rest)
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    _, end = run(server, job_for("FSDP", model, data, tmp_path / "4", **asked))
    assert not end.completed, "their moments cannot be sharded"
    assert optimizer in end.message
