"""Trials on two devices, over gloo: the same run as on one, and what happens when it is cut short."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from autosft.profiles.model.sparsity import num_lost
from autosft.profiles.recipe import Checkpointing, Method, Precision, Sharding
from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, StopReason, TrainingSettings, TrialJob
from autosft.workers.processes.starters import WarmServer
from autosft.workers.ranks import ProcessGroup
from autosft.workers.runners.attempt_monitor import Attempt
from tests.workers import small
from tests.workers.training.test_zero_masks import pruned, unstructured

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="forks")]


def test_a_gang_can_agree_on_every_reason_to_stop() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = ProcessGroup()
        assert [group.agree(item) for item in (None, *StopReason)] == [None, *StopReason]
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def server() -> Iterator[WarmServer]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        warm = WarmServer()
        yield warm
        warm.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_data(tmp_path_factory.mktemp("data"))


WAYS = {
    "one process": (Sharding.NONE, 1, 8),
    "one process, accumulated": (Sharding.NONE, 1, 2),
    "DDP": (Sharding.DDP, 2, 4),
    "DDP, accumulated": (Sharding.DDP, 2, 2),
    "FSDP": (Sharding.FSDP, 2, 4),
    "FSDP, accumulated": (Sharding.FSDP, 2, 1),
}


def job_for(way: str, model: Path, data: Path, output: Path, **changes: object) -> TrialJob:
    sharding, num_devices, micro_batch = WAYS[way]
    plan = small.plan(
        micro_batch=micro_batch,
        effective_batch_size=8,
        gradient_accumulation=8 // micro_batch // num_devices,
        data_parallel=num_devices,
        sharding=sharding,
        checkpointing=Checkpointing.NON_REENTRANT if micro_batch == 1 else Checkpointing.OFF,
    )
    uuids = tuple(f"CPU-{rank}" for rank in range(num_devices))
    return small.job(model, data, output, plan=plan, device_uuids=uuids, **changes)


def run(
    server: WarmServer, job: TrialJob, *, stop_after: int | None = None, terminate: int | None = None
) -> tuple[list[Measurement], AttemptEnd]:
    """Run a job; after `stop_after` steps stop it, or send SIGTERM to the process of rank `terminate`."""
    attempt = Attempt(server, job)
    reports: list[Measurement] = []
    for event in attempt.events():
        if isinstance(event, AttemptEnd):
            return reports, event
        reports.append(event)
        if event.step == stop_after:
            if terminate is None:
                attempt.stop(StopReason.SHUTDOWN)
            else:
                os.kill(attempt.pids[terminate], signal.SIGTERM)
    raise AssertionError("an attempt ends")


def curve(reports: list[Measurement]) -> list[tuple[int, float, float]]:
    """Return step, loss, and gradient norm or evaluation loss of every report that has them."""
    return [
        (report.step, report.loss, report.metric("eval_loss") if report.is_evaluation else report.grad_norm)
        for report in reports
        if report.loss is not None and not (report.checkpoint and not report.is_evaluation)
    ]


def assert_same(one: list[Measurement], other: list[Measurement], *, rel: float = 2e-5) -> None:
    assert len(curve(one)) == len(curve(other)) >= 12
    for left, right in zip(curve(one), curve(other), strict=True):
        assert left == pytest.approx(right, rel=rel)


def weights(reports: list[Measurement]) -> dict[str, Any]:
    from safetensors.torch import load_file

    checkpoint = reports[-1].checkpoint
    assert checkpoint is not None
    [file] = Path(checkpoint).glob("*model.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def whole(
    server: WarmServer, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Measurement]:
    """Return the reports of a run by one process."""
    reports, end = run(server, job_for("one process", model, data, tmp_path_factory.mktemp("whole")))
    assert end.completed, end.message
    return reports


@pytest.mark.parametrize("way", [way for way in WAYS if way != "one process"])
def test_a_run_is_the_same_on_two_devices(
    server: WarmServer, model: Path, data: Path, tmp_path: Path, whole: list[Measurement], way: str
) -> None:
    reports, end = run(server, job_for(way, model, data, tmp_path))
    assert end.completed, end.message
    assert_same(whole, reports)
    expected, found = weights(whole), weights(reports)
    assert expected.keys() == found.keys()
    assert all((found[name] - expected[name]).abs().max() < 1e-4 for name in expected)


def test_tied_embeddings_are_the_same_or_refused(server: WarmServer, data: Path, tmp_path: Path) -> None:
    even = small.make_model(tmp_path / "even", vocab_size=small.VOCAB_SIZE // 2 * 2 + 2, is_tied=True)
    whole, found = (
        run(server, job_for(way, even, data, tmp_path / way))[0]
        for way in ("one process", "FSDP, accumulated")
    )
    assert_same(whole, found)
    odd = small.make_model(tmp_path / "odd", vocab_size=small.VOCAB_SIZE // 2 * 2 + 1, is_tied=True)
    _, end = run(server, job_for("FSDP", odd, data, tmp_path / "refused"))
    assert not end.completed
    assert "only one of the two would be trained" in end.message


@pytest.mark.parametrize(
    ("what", "rel"),
    [("lora", 2e-5), ("bf16-autocast", 4e-3), ("bf16", 4e-2)],  # bf16 has 8 bits: a step is 4e-3
)
def test_adapters_and_16_bits_are_the_same_too(
    server: WarmServer, model: Path, data: Path, tmp_path: Path, what: str, rel: float
) -> None:
    changes: dict[str, object] = {
        "settings": small.lora() if what == "lora" else small.settings(),
        "pinned": small.pinned(data, precision=Precision.FP32 if what == "lora" else Precision(what)),
    }
    runs = []
    for way in ("one process", "DDP, accumulated", "FSDP, accumulated"):
        reports, end = run(server, job_for(way, model, data, tmp_path / way, **changes))
        assert end.completed, (way, end.message)
        runs.append(reports)
    assert_same(runs[0], runs[1], rel=rel)
    assert_same(runs[0], runs[2], rel=rel)


@pytest.mark.parametrize("way", ["DDP, accumulated", "FSDP"])
def test_examples_in_one_row_are_the_same_too(
    server: WarmServer, model: Path, data: Path, tmp_path: Path, whole: list[Measurement], way: str
) -> None:
    reports, end = run(
        server, job_for(way, model, data, tmp_path, pinned=small.pinned(data, padding_free=True))
    )
    assert end.completed, end.message
    assert_same(whole, reports)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("FSDP", "FSDP"),
        ("FSDP, accumulated", "one process"),
        ("one process", "FSDP"),
        ("DDP", "one process, accumulated"),
    ],
)
def test_a_gang_resumes_where_it_was_interrupted(
    server: WarmServer,
    model: Path,
    data: Path,
    tmp_path: Path,
    whole: list[Measurement],
    first: str,
    then: str,
) -> None:
    parts, end = run(server, job_for(first, model, data, tmp_path), stop_after=3)
    assert end.stopped is StopReason.SHUTDOWN
    assert parts[-1].step < 8
    checkpoint = parts[-1].checkpoint
    rest, end = run(server, job_for(then, model, data, tmp_path, attempt=2, resume_from=checkpoint))
    assert end.completed, end.message
    assert_same(whole, parts + rest)


def test_a_gang_over_two_nodes_is_one_run(
    server: WarmServer, model: Path, data: Path, tmp_path: Path, whole: list[Measurement]
) -> None:
    job = job_for("FSDP", model, data, tmp_path)
    near, far = (Attempt(server, job, ranks=[rank]) for rank in (0, 1))
    *reports, end = near.events()
    assert isinstance(end, AttemptEnd)
    assert end.completed, end.message
    assert_same(whole, [report for report in reports if isinstance(report, Measurement)])
    [nothing] = far.events()
    assert isinstance(nothing, AttemptEnd)
    assert (nothing.failure, nothing.stopped) == (None, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_is_taken_away_saves_first(
    server: WarmServer, model: Path, data: Path, tmp_path: Path, rank: int
) -> None:
    job = job_for("DDP", model, data, tmp_path, settings=small.settings(num_train_examples=4000))
    reports, end = run(server, job, stop_after=5, terminate=rank)
    assert (end.stopped, end.failure) == (StopReason.SHUTDOWN, None)
    assert reports[-1].checkpoint is not None
    assert (Path(reports[-1].checkpoint) / "optimizer.pt").is_file()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_gang_that_loses_a_rank_is_lost_and_gone(
    server: WarmServer, model: Path, data: Path, tmp_path: Path, rank: int
) -> None:
    settings: TrainingSettings = small.settings(num_train_examples=8000)
    attempt = Attempt(server, job_for("FSDP", model, data, tmp_path, settings=settings))
    events = attempt.events()
    next(events)
    os.kill(attempt.pids[rank], signal.SIGKILL)
    *_, end = events
    assert isinstance(end, AttemptEnd)
    assert end.failure is FailureKind.WORKER_LOST, end.message
    assert f"rank {rank}: killed by SIGKILL" in end.message
    assert not any(psutil.pid_exists(pid) for pid in attempt.pids.values())


@pytest.mark.parametrize("way", ["DDP, accumulated", "FSDP, accumulated"])
def test_sparse_fine_tuning_keeps_its_zeros_on_two_devices(
    server: WarmServer, data: Path, tmp_path: Path, way: str
) -> None:
    base = pruned(tmp_path / "base", unstructured)
    settings = small.settings(method=Method.SPARSE, weight_decay=0.1)
    jobs = [job_for(item, base, data, tmp_path / item, settings=settings) for item in ("one process", way)]
    (alone, _), (together, end) = (run(server, job) for job in jobs)
    assert end.completed, end.message
    assert_same(alone, together)
    checkpoint = together[-1].checkpoint
    assert checkpoint is not None
    assert num_lost(str(base), checkpoint) == 0
