"""Processes that load ahead: the attempt that comes is the one it would have been, only sooner."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, TrialJob
from autosft.workers.processes.starters import Connector, SocketChannel, WarmServer, prepare
from autosft.workers.runners.attempt_monitor import PREPARE_FUNCTION, Attempt, log_path_of
from autosft.workers.training.preload import has_room
from tests.plans import GIB, execution_plan, memory_estimate
from tests.workers import small
from tests.workers.processes.test_starters import ROOT, is_gone, last, wait_for
from tests.workers.scripted import make_job

ODD = "tests.workers.odd_training"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and forks")]


@pytest.fixture(scope="module")
def server() -> Iterator[WarmServer]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        warm = WarmServer(imports=[ODD])
        yield warm
        warm.close()


def prepared_pid(server: WarmServer, before: set[int]) -> int:
    """Return the process that the server has forked since."""
    assert server.pid is not None
    process = psutil.Process(server.pid)
    wait_for(lambda: bool({child.pid for child in process.children()} - before))
    [pid] = {child.pid for child in process.children()} - before
    return pid


def start_prepared(server: WarmServer, trial: int) -> tuple[SocketChannel, int]:
    assert server.pid is not None
    wait_for(server.socket_path.exists)
    before = {child.pid for child in psutil.Process(server.pid).children()}
    channel = prepare(server.socket_path, f"{ODD}:prepare", replace(make_job(), trial=trial))
    return channel, prepared_pid(server, before)


def run(server: WarmServer, channel: SocketChannel, folder: Path) -> dict[str, object]:
    job = replace(make_job(output_dir=folder), trial=8)
    end = last(Attempt(Connector(server.socket_path, channel), job, function=f"{ODD}:tell_prepared"))
    assert end.completed, end.message
    said: dict[str, object] = json.loads(log_path_of(job).read_text().splitlines()[-1])
    return said


def test_an_attempt_runs_in_the_process_that_has_loaded_for_it(server: WarmServer, tmp_path: Path) -> None:
    channel, pid = start_prepared(server, 7)
    assert run(server, channel, tmp_path) == {"pid": pid, "prepared_for": [7]}
    wait_for(lambda: is_gone(pid))


def test_an_attempt_continues_without_what_could_not_be_preloaded(server: WarmServer, tmp_path: Path) -> None:
    channel, pid = start_prepared(server, 13)
    assert run(server, channel, tmp_path) == {"pid": pid, "prepared_for": []}


def test_an_attempt_has_a_fresh_process_where_the_prepared_one_has_died(
    server: WarmServer, tmp_path: Path
) -> None:
    channel, pid = start_prepared(server, 7)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not channel.is_silent())
    said = run(server, channel, tmp_path)
    assert said["prepared_for"] == []
    assert said["pid"] != pid


def test_the_actor_of_an_attempt_brings_the_process_that_was_prepared(
    server: WarmServer, tmp_path: Path
) -> None:
    from autosft.workers.runners.ray_runner import TrialActor

    actor = TrialActor()
    for attempt, expect in ((1, [7]), (2, [])):  # once
        if attempt == 1:
            actor.prepare(replace(make_job(), trial=7), server.socket_path, f"{ODD}:prepare")
        job = replace(make_job(output_dir=tmp_path), trial=8, attempt=attempt)
        *_, [end] = actor.run(job, [0], server.socket_path, {"function": f"{ODD}:tell_prepared"})
        assert isinstance(end, AttemptEnd)
        assert end.completed, end.message
        assert json.loads(log_path_of(job).read_text().splitlines()[-1])["prepared_for"] == expect


def test_a_prepared_process_ends_with_whoever_wanted_it(server: WarmServer) -> None:
    channel, pid = start_prepared(server, 7)
    channel.close()
    wait_for(lambda: is_gone(pid))


@pytest.mark.parametrize(
    ("device", "weights_gib", "free_gib", "expect"),
    [
        ("GPU-0", 28, 110, True),
        ("GPU-0", 28, 90, False),  # less than half of the memory would stay free
        ("CPU-0", 1, 110, True),
        ("CPU-0", 28, 110, False),  # it is the trials' own memory
    ],
)
def test_weights_are_loaded_ahead_where_memory_allows(
    device: str, weights_gib: int, free_gib: int, expect: bool
) -> None:
    estimate = replace(memory_estimate(), components=(("parameters", weights_gib * GIB),))
    job = replace(make_job(), device_uuids=(device,), plan=replace(execution_plan(), estimate=estimate))
    assert has_room(job, free_bytes=free_gib * GIB, total_bytes=128 * GIB) is expect


def test_what_is_loaded_ahead_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    model, data = small.make_model(tmp_path / "model"), small.make_data(tmp_path / "data")
    ends: list[AttemptEnd] = []
    curves = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        warm = WarmServer()
    for name in ("cold", "ahead", "another length"):
        job: TrialJob = small.job(model, data, tmp_path / name, settings=small.lora(num_train_examples=32))
        before = job if name == "ahead" else replace(job, pinned=replace(job.pinned, eval_seq_len=16))
        channel = None if name == "cold" else prepare(warm.socket_path, PREPARE_FUNCTION, before)
        *reports, end = Attempt(Connector(warm.socket_path, channel), job).events()
        assert isinstance(end, AttemptEnd)
        assert end.failure is None, end.message
        ends.append(end)
        curves.append(
            [
                (report.step, report.loss, report.metrics)
                for report in reports
                if isinstance(report, Measurement)
            ]
        )
    warm.close()
    assert curves[0] == curves[1] == curves[2]
    assert FailureKind.OUT_OF_MEMORY not in {end.failure for end in ends}
    peaks = [end.peak_allocated_bytes or 0 for end in ends]
    assert max(peaks) - min(peaks) < 24 << 20, "what was loaded ahead counts as the attempt's"
