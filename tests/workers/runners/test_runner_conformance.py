"""The contract of `TrialRunner`, held over the fake, over local processes and over Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, StopReason, TrialEvent
from autosft.studies.wire import from_plain
from autosft.workers.runner import TrialRunner
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import FAILURES, IMPATIENT, Fault, Script, hang_limit_s, make_job, timeline

ROOT = Path(__file__).parents[3]
STOP_GRACE_S = 0.3  # how long the real runners wait for a hung attempt in this suite
FAR = "CPU-far"  # on another node, where a runner has several
WARM = pytest.param("warm", marks=pytest.mark.slow)
RAY = pytest.param("ray", marks=pytest.mark.ray)
#: With a starter that begins each attempt in a process of its own: what only the start of a process decides.
EVERY_STARTER = pytest.mark.parametrize(
    "runner", ["fake", WARM, pytest.param("cold", marks=pytest.mark.slow), RAY], indirect=True
)
#: Runners of one node know no far device.
GANGS = pytest.mark.parametrize(
    ("runner", "gang"),
    [
        pytest.param("fake", ("CPU-0", "CPU-1"), id="fake"),
        pytest.param("warm", ("CPU-0", "CPU-1"), marks=pytest.mark.slow, id="warm"),
        pytest.param("ray", ("CPU-0", "CPU-1"), marks=pytest.mark.ray, id="ray-near"),
        pytest.param("ray", ("CPU-0", FAR), marks=pytest.mark.ray, id="ray-far"),
    ],
    indirect=["runner"],
    scope="module",  # so that all tests of one runner follow each other
)


@pytest.fixture(scope="module", params=["fake", WARM, RAY])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialRunner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where the processes find tests.workers.scripted
        yield from RUNNERS[request.param]()


def fake_runner() -> Iterator[TrialRunner]:
    yield FakeRunner(lambda job: from_plain(Script, json.loads(job.model)), hang_limit_s=hang_limit_s)


def options() -> dict[str, Any]:
    return {
        "function": "tests.workers.scripted:train",
        "stop_grace_s": STOP_GRACE_S,
        "hang_limit_s": hang_limit_s,
    }


def local_runner(*, warm: bool) -> Iterator[TrialRunner]:
    from autosft.workers.processes.starters import ColdStarter, WarmServer
    from autosft.workers.runners.local_runner import LocalRunner

    starter = WarmServer(imports=["tests.workers.scripted"]) if warm else ColdStarter()
    local = LocalRunner(starter, **options())
    yield local
    local.close(grace_s=0)


def ray_runner() -> Iterator[TrialRunner]:
    import ray

    from autosft.scheduler.cluster.ray_cluster import start_local

    with start_local(imports=["tests.workers.scripted"]) as cluster:
        cluster.wait_until_ready()
        # The same node once more: with a warm server and actors of its own, as any other would have.
        node = ray.get_runtime_context().get_node_id()
        loads = "tests.workers.odd_training:prepare"
        runner = cluster.runner(node_of={FAR: node}, prepare_function=loads, **options())
        yield runner
        runner.close(grace_s=0)


RUNNERS: dict[str, Callable[[], Iterator[TrialRunner]]] = {
    "fake": fake_runner,
    "warm": lambda: local_runner(warm=True),
    "cold": lambda: local_runner(warm=False),
    "ray": ray_runner,
}


def until_ends(runner: TrialRunner, num_ends: int) -> list[TrialEvent]:
    """Collect events until so many attempts have ended, and make sure that nothing follows."""
    events: list[TrialEvent] = []
    while sum(isinstance(event, AttemptEnd) for event in events) < num_ends:
        batch = runner.events(200.0)
        assert batch, "nothing happened"
        events += batch
    return [*events, *runner.events(0.0)]


def until_measured(runner: TrialRunner) -> list[TrialEvent]:
    events: list[TrialEvent] = []
    while not events:
        events += runner.events(200.0)
    return events


@EVERY_STARTER
def test_reports_come_in_order_and_the_end_comes_last(runner: TrialRunner, tmp_path: Path) -> None:
    script = Script(num_steps=6, eval_losses=(2.0, 1.5, 1.2))
    job = make_job(script, output_dir=tmp_path)
    runner.run(job)
    *measurements, end = until_ends(runner, 1)
    assert isinstance(end, AttemptEnd)
    assert end.completed, end.message
    assert measurements == list(timeline(job, script))
    assert (end.stopped, end.failure) == (None, None)
    assert end.eval_fingerprint == job.pinned.eval_fingerprint


@pytest.mark.parametrize("device", ["CPU-0", FAR])
def test_getting_ready_is_only_a_hint(runner: TrialRunner, tmp_path: Path, device: str) -> None:
    script = Script(num_steps=2, eval_losses=(2.0,))
    for attempt in (1, 2, 3):  # prepared for while nothing runs, then while one does, then not
        job = replace(make_job(script, output_dir=tmp_path, attempt=attempt), device_uuids=(device,))
        if attempt == 1:
            runner.prepare(job)
        runner.run(job)
        if attempt == 1:
            runner.prepare(job)
            runner.prepare(job)
        *measurements, end = until_ends(runner, 1)
        assert isinstance(end, AttemptEnd)
        assert end.completed, end.message
        assert measurements == list(timeline(job, script))


@pytest.mark.parametrize(
    "fault", [fault for fault in FAILURES if fault is not Fault.NON_FINITE_LOSS], ids=lambda fault: fault.name
)
def test_every_fault_ends_once_with_its_kind(runner: TrialRunner, tmp_path: Path, fault: Fault) -> None:
    runner.run(make_job(Script(fault=fault, fault_step=3), output_dir=tmp_path))
    *measurements, end = until_ends(runner, 1)
    assert [m.step for m in measurements if isinstance(m, Measurement)] == [1, 2]
    assert isinstance(end, AttemptEnd)
    assert end.failure is FAILURES[fault]
    assert not end.completed
    assert end.stopped is None
    assert end.message
    assert end.peak_allocated_bytes == 1000


def test_a_non_finite_loss_is_reported_by_training_itself(runner: TrialRunner, tmp_path: Path) -> None:
    runner.run(make_job(Script(fault=Fault.NON_FINITE_LOSS), output_dir=tmp_path))
    *_, end = until_ends(runner, 1)
    assert isinstance(end, AttemptEnd)
    assert end.failure is FailureKind.NON_FINITE_LOSS


@pytest.mark.parametrize("reason", StopReason)
def test_a_stopped_attempt_reports_the_reason(
    runner: TrialRunner, tmp_path: Path, reason: StopReason
) -> None:
    runner.run(make_job(Script(fault=Fault.WAIT), output_dir=tmp_path))
    until_measured(runner)
    runner.stop(0, 1, reason)
    *_, end = until_ends(runner, 1)
    assert isinstance(end, AttemptEnd)
    assert end.stopped is reason
    assert end.failure is None


@EVERY_STARTER
def test_a_stop_right_behind_the_start_is_heard(runner: TrialRunner, tmp_path: Path) -> None:
    runner.run(make_job(Script(fault=Fault.WAIT), output_dir=tmp_path))
    runner.stop(0, 1, StopReason.PAUSED)
    *_, end = until_ends(runner, 1)
    assert isinstance(end, AttemptEnd)
    assert end.stopped is StopReason.PAUSED


@EVERY_STARTER
def test_a_hung_attempt_is_killed_after_the_grace(runner: TrialRunner, tmp_path: Path) -> None:
    runner.run(make_job(Script(fault=Fault.HANG), output_dir=tmp_path))
    until_measured(runner)
    runner.stop(0, 1, StopReason.PRUNED)
    *_, end = until_ends(runner, 1)
    assert isinstance(end, AttemptEnd)
    assert end.stopped is StopReason.PRUNED


def test_an_attempt_without_progress_is_lost(runner: TrialRunner, tmp_path: Path) -> None:
    runner.run(make_job(Script(fault=Fault.HANG), trial=IMPATIENT, output_dir=tmp_path))
    *_, end = until_ends(runner, 1)
    assert isinstance(end, AttemptEnd)
    assert end.failure is FailureKind.WORKER_LOST


@GANGS
def test_a_gang_reports_once(runner: TrialRunner, tmp_path: Path, gang: tuple[str, ...]) -> None:
    script = Script(num_steps=6, eval_losses=(2.0, 1.5, 1.2))
    job = make_job(script, output_dir=tmp_path, device_uuids=gang)
    runner.run(job)
    *measurements, end = until_ends(runner, 1)
    assert measurements == list(timeline(job, script))
    assert isinstance(end, AttemptEnd)
    assert end.completed


@GANGS
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "fault",
    [Fault.LOST, Fault.EXIT, Fault.OUT_OF_MEMORY, Fault.EVALUATION_OUT_OF_MEMORY, Fault.ERROR],
    ids=str,
)
def test_a_gang_ends_once_with_the_fault_of_one_rank(
    runner: TrialRunner, tmp_path: Path, fault: Fault, rank: int, gang: tuple[str, ...]
) -> None:
    script = Script(fault=fault, fault_step=3, fault_rank=rank)
    runner.run(make_job(script, output_dir=tmp_path, device_uuids=gang))
    *_, end = until_ends(runner, 1)
    assert isinstance(end, AttemptEnd)
    assert end.failure is FAILURES[fault]


@GANGS
@pytest.mark.parametrize("fault", [Fault.WAIT, Fault.HANG], ids=str)
def test_a_gang_is_stopped_as_one(
    runner: TrialRunner, tmp_path: Path, fault: Fault, gang: tuple[str, ...]
) -> None:
    runner.run(make_job(Script(fault=fault, fault_rank=1), output_dir=tmp_path, device_uuids=gang))
    until_measured(runner)
    runner.stop(0, 1, StopReason.SHUTDOWN)
    *_, end = until_ends(runner, 1)
    assert isinstance(end, AttemptEnd)
    assert end.stopped is StopReason.SHUTDOWN
    assert end.failure is None


def test_an_attempt_that_ended_of_itself_reports_its_own_end(runner: TrialRunner, tmp_path: Path) -> None:
    runner.run(make_job(Script(), output_dir=tmp_path))
    *_, end = until_ends(runner, 1)
    runner.stop(0, 1, StopReason.USER)
    runner.stop(7, 1, StopReason.USER)  # never ran
    assert runner.events(0.0) == [] or not runner.events(0.0)
    assert isinstance(end, AttemptEnd)
    assert end.completed


def test_attempts_run_side_by_side(runner: TrialRunner, tmp_path: Path) -> None:
    for trial in range(3):
        runner.run(make_job(Script(fault=Fault.WAIT), trial=trial, output_dir=tmp_path / str(trial)))
    waiting = set()
    while len(waiting) < 3:  # all three have begun before any has ended
        waiting |= {event.trial for event in runner.events(200.0)}
    for trial in waiting:
        runner.stop(trial, 1, StopReason.USER)
    ends = [event for event in until_ends(runner, 3) if isinstance(event, AttemptEnd)]
    assert sorted(end.trial for end in ends) == [0, 1, 2]


@EVERY_STARTER
def test_a_retry_resumes_from_its_checkpoint(runner: TrialRunner, tmp_path: Path) -> None:
    runner.run(make_job(Script(fault=Fault.LOST, fault_step=4), output_dir=tmp_path))
    *measurements, _ = until_ends(runner, 1)
    [checkpoint] = [m.checkpoint for m in measurements if isinstance(m, Measurement) and m.checkpoint]
    runner.run(make_job(Script(), attempt=2, output_dir=tmp_path, resume_from=checkpoint))
    *measurements, end = until_ends(runner, 1)
    assert [m.step for m in measurements if isinstance(m, Measurement)] == [3, 4]
    assert {event.attempt for event in measurements} == {2}
    assert isinstance(end, AttemptEnd)
    assert end.completed


def test_the_clock_advances(runner: TrialRunner) -> None:
    before = runner.now()
    assert not runner.events(0.01)
    assert runner.now() > before
