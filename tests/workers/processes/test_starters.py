"""Processes of attempts: what they see, what ends them, how that is told, and that nothing stays behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from autosft.profiles.hardware.local_sockets import INTERFACE_VARIABLES
from autosft.studies.trial import AttemptEnd, FailureKind, StopReason, TrialJob
from autosft.workers.processes.attempt_process import environment_of
from autosft.workers.processes.starters import ColdStarter, WarmServer, server_environment
from autosft.workers.ranks import Seat
from autosft.workers.runners.attempt_monitor import Attempt, hang_limit_s, log_path_of, wait_until_gone
from tests.workers.scripted import FAILURES, Fault, Script, make_job

ROOT = Path(__file__).parents[3]
TRAIN = "tests.workers.scripted:train"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and forks")]


@pytest.fixture(scope="module")
def server() -> Iterator[WarmServer]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        warm = WarmServer(imports=["tests.workers.scripted", "tests.workers.odd_training"])
        yield warm
        warm.close()


def start(server: WarmServer, job: TrialJob, function: str = TRAIN, **options: Any) -> Attempt:
    return Attempt(server, job, function=function, **options)


def last(attempt: Attempt) -> AttemptEnd:
    *_, event = attempt.events()
    assert isinstance(event, AttemptEnd)
    return event


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- what an attempt sees -----------------------------------------------------------------------------


def test_tunables_of_the_user_stay_before_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    ours = server_environment()["GLIBC_TUNABLES"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.rtld.optional_static_tls=2048")
    assert server_environment()["GLIBC_TUNABLES"] == f"glibc.rtld.optional_static_tls=2048:{ours}"


def test_output_goes_to_the_log_of_the_attempt(server: WarmServer, tmp_path: Path) -> None:
    job = make_job(Script(output="hello from step 1"), output_dir=tmp_path / "new", attempt=3)
    event = last(start(server, job))
    assert event.log_path == str(tmp_path / "new" / "attempt-3.log")
    assert "hello from step 1" in Path(event.log_path).read_text()


@pytest.mark.parametrize("fault", [None, Fault.ERROR, Fault.DISK_FULL], ids=str)
def test_a_full_disk_under_the_log_does_not_decide_how_an_attempt_ends(
    server: WarmServer, tmp_path: Path, fault: Fault | None
) -> None:
    log_path_of(make_job(output_dir=tmp_path)).symlink_to("/dev/full")
    job = make_job(Script(output="x" * 100_000, fault=fault), output_dir=tmp_path)
    event = last(start(server, job))
    assert event.completed is (fault is None)
    assert event.failure is (None if fault is None else FAILURES[fault])


@pytest.mark.parametrize(
    ("uuids", "visible"), [(("CPU-host",), ""), (("GPU-a",), "GPU-a"), (("GPU-a", "MIG-b"), "GPU-a,MIG-b")]
)
def test_only_the_devices_of_the_attempt_are_visible(uuids: tuple[str, ...], visible: str) -> None:
    seat = Seat(rank=0, ranks_here=tuple(range(len(uuids))))
    assert environment_of(replace(make_job(), device_uuids=uuids), seat)["CUDA_VISIBLE_DEVICES"] == visible


def test_a_rank_knows_its_place_on_its_node() -> None:
    job = replace(make_job(), device_uuids=("GPU-a", "GPU-b", "GPU-c"))
    seen = environment_of(job, Seat(rank=2, ranks_here=(1, 2)))
    assert seen["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-c"
    assert [seen[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["2", "1", "3"]


def test_ranks_listen_on_loopback_unless_some_are_on_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = set(INTERFACE_VARIABLES)
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    job = replace(make_job(), device_uuids=("GPU-a", "GPU-b", "GPU-c"))
    assert variables <= set(environment_of(job, Seat(rank=1, ranks_here=(0, 1, 2))))
    assert not variables & set(environment_of(job, Seat(rank=2, ranks_here=(1, 2))))
    assert not variables & set(environment_of(make_job(), Seat(rank=0, ranks_here=(0,))))


def test_an_attempt_has_a_session_and_an_environment_of_its_own(server: WarmServer, tmp_path: Path) -> None:
    job = make_job(output_dir=tmp_path)
    last(start(server, job, "tests.workers.odd_training:look_around"))
    seen = json.loads(log_path_of(job).read_text())
    assert seen["sid"] == seen["pgid"] == seen["pid"]
    assert seen["parent"] == server.pid
    assert seen["threads"] == "1"
    assert seen["cuda"] == ""
    # Its log three times, the socket to us, the pipe with stops: nothing of the server's.
    assert len(seen["fds"]) <= 6, seen["fds"]


def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    warm = WarmServer(tmp_path / "w", imports=[])
    try:
        assert (tmp_path / "w").stat().st_mode & 0o777 == 0o700
    finally:
        warm.close()
    assert not (tmp_path / "w" / "warm.sock").exists()


def test_a_server_that_cannot_start_is_no_loss_of_a_trial(tmp_path: Path) -> None:
    """It would end so for each, and each would be tried again until it fails."""
    warm = WarmServer(tmp_path / "w", imports=["no_such_module"])
    try:
        attempt = Attempt(warm, make_job(Script(), output_dir=tmp_path), function=TRAIN)
        [end] = list(attempt.events())
    finally:
        warm.close()
    assert isinstance(end, AttemptEnd)
    assert end.failure is FailureKind.NOT_STARTED
    assert "No module named 'no_such_module'" in end.message


def test_a_server_whose_disk_turned_read_only_is_closed_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = WarmServer(tmp_path / "w", imports=[])
    assert warm.pid is not None
    process = psutil.Process(warm.pid)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "unlink", refuse)
    warm.close()
    assert not process.is_running()


# --- memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cap_mib", "failure"), [(100, FailureKind.OUT_OF_MEMORY), (700, None)], ids=["too small", "enough"]
)
def test_the_memory_cap_is_enforced_in_the_process(
    server: WarmServer, tmp_path: Path, cap_mib: int, failure: FailureKind | None
) -> None:
    job = make_job(output_dir=tmp_path, memory_cap_bytes=cap_mib << 20)
    assert last(start(server, job, "tests.workers.odd_training:take_600_mib")).failure is failure


# --- what ends it -------------------------------------------------------------------------------------


def test_descendants_are_gone_when_the_end_is_told(server: WarmServer, tmp_path: Path) -> None:
    job = make_job(output_dir=tmp_path)
    event = last(start(server, job, "tests.workers.odd_training:leave_children"))
    assert event.completed
    for pid in map(int, log_path_of(job).read_text().split()):
        assert is_gone(pid)


def test_a_hung_attempt_leaves_its_stack_in_the_log(server: WarmServer, tmp_path: Path) -> None:
    attempt = start(server, make_job(Script(fault=Fault.HANG), output_dir=tmp_path), stop_grace_s=0.0)
    events = attempt.events()
    next(events)
    attempt.stop(StopReason.PRUNED)
    *_, event = events
    assert isinstance(event, AttemptEnd)
    assert event.stopped is StopReason.PRUNED
    assert "not stopped" in event.message
    assert event.log_path is not None
    assert "scripted.py" in Path(event.log_path).read_text()


def test_an_attempt_that_falls_silent_is_killed(server: WarmServer, tmp_path: Path) -> None:
    job = make_job(Script(fault=Fault.HANG), output_dir=tmp_path)
    event = last(start(server, job, hang_limit_s=lambda job, has_begun: 0.3 if has_begun else 60.0))
    assert event.failure is FailureKind.WORKER_LOST
    assert "no progress" in event.message
    assert event.log_path is not None
    assert "scripted.py" in Path(event.log_path).read_text(), "the stack is kept"


def test_sigterm_asks_for_a_shutdown(server: WarmServer, tmp_path: Path) -> None:
    attempt = start(server, make_job(Script(fault=Fault.WAIT), output_dir=tmp_path))
    events = attempt.events()
    next(events)
    assert attempt.pid is not None
    os.kill(attempt.pid, signal.SIGTERM)
    *_, event = events
    assert isinstance(event, AttemptEnd)
    assert event.stopped is StopReason.SHUTDOWN


def test_a_server_that_is_told_to_leave_lets_its_attempts_save_first(tmp_path: Path) -> None:
    warm = WarmServer(imports=["tests.workers.scripted"])
    attempts = [
        start(warm, make_job(Script(fault=Fault.WAIT), trial=trial, output_dir=tmp_path / str(trial)))
        for trial in range(2)
    ]
    try:
        streams = [attempt.events() for attempt in attempts]
        for stream in streams:
            next(stream)
        assert warm.pid is not None
        leaving = psutil.Process(warm.pid)
        leaving.terminate()
        for *_, event in streams:
            assert isinstance(event, AttemptEnd)
            assert event.stopped is StopReason.SHUTDOWN
        wait_for(lambda: is_gone(leaving.pid))
        assert last(start(warm, make_job(output_dir=tmp_path, attempt=2))).completed, "it starts again"
    finally:
        warm.close()


@dataclass(frozen=True)
class Limit:
    name: str
    has_begun: bool
    step_s: float
    parameter_gib: float
    data_parallel: int
    expect_s: float


LIMITS = [
    Limit("a small model that trains", True, 0.1, 0.0, 1, 122.0),
    Limit("steps of a minute", True, 60.0, 0.0, 1, 1320.0),
    Limit("a checkpoint to be written", True, 0.1, 100.0, 1, 1195.7),
    Limit("of which this device has a half", True, 0.1, 50.0, 2, 1195.7),
    Limit("a model to be fetched", False, 0.1, 14.0, 1, 2105.2),
]


@pytest.mark.parametrize("case", LIMITS, ids=lambda case: case.name)
def test_the_patience_with_an_attempt_follows_from_its_plan(case: Limit) -> None:
    job = make_job()
    num_steps = job.settings.num_train_examples // job.settings.effective_batch_size
    components = (("parameters", int(case.parameter_gib * 2**30)), ("activations", 2**40))
    plan = replace(
        job.plan,
        predicted_duration_s=case.step_s * num_steps,
        data_parallel=case.data_parallel,
        estimate=replace(job.plan.estimate, components=components),
    )
    limit_s = hang_limit_s(replace(job, plan=plan), has_begun=case.has_begun)
    assert limit_s == pytest.approx(case.expect_s, rel=1e-3)


def test_giving_an_attempt_up_kills_it(server: WarmServer, tmp_path: Path) -> None:
    attempt = start(server, make_job(Script(fault=Fault.HANG), output_dir=tmp_path))
    next(attempt.events())
    assert attempt.pid is not None
    attempt.close()
    wait_for(lambda: is_gone(attempt.pid or 0))


def test_an_attempt_that_nobody_follows_can_be_ended_by_name(server: WarmServer, tmp_path: Path) -> None:
    job = make_job(Script(fault=Fault.HANG), output_dir=tmp_path)
    attempt = start(server, job)
    next(attempt.events())
    assert attempt.pid is not None
    assert wait_until_gone(server.socket_path, job)
    assert is_gone(attempt.pid)
    assert wait_until_gone(server.socket_path, job), "one that is not there is gone too"


def test_a_killed_server_takes_its_attempts_along_and_starts_again(
    server: WarmServer, tmp_path: Path
) -> None:
    attempt = start(server, make_job(Script(fault=Fault.HANG), output_dir=tmp_path))
    events = attempt.events()
    next(events)
    assert attempt.pid is not None
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    *_, event = events
    assert isinstance(event, AttemptEnd)
    assert event.failure is FailureKind.WORKER_LOST
    wait_for(lambda: is_gone(attempt.pid or 0))
    assert last(start(server, make_job(output_dir=tmp_path, attempt=2))).completed


@pytest.mark.parametrize("starter", ["WarmServer(imports=[])", "ColdStarter()"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_owner(tmp_path: Path, starter: str, how: signal.Signals) -> None:
    program = f"""
        from autosft.workers.runners.attempt_monitor import Attempt
        from autosft.workers.processes.starters import ColdStarter, WarmServer, server_environment
        from tests.workers.scripted import Fault, Script, make_job
        attempt = Attempt({starter}, make_job(Script(fault=Fault.HANG), output_dir={str(tmp_path)!r}),
                          function={TRAIN!r})
        for event in attempt.events():
            print(attempt.pid, flush=True)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    ours = [*psutil.Process(owner.pid).children(recursive=True), psutil.Process(pid)]
    owner.send_signal(how)
    owner.wait()
    wait_for(lambda: all(is_gone(process.pid) for process in ours))
    assert not list(tmp_path.glob("autosft-*")), "the server's folder is left"


def test_a_server_reports_failed_imports(tmp_path: Path) -> None:
    warm = WarmServer(imports=["autosft.no_such_module"])
    try:
        event = last(start(warm, make_job(output_dir=tmp_path)))
    finally:
        warm.close()
    assert event.failure is FailureKind.NOT_STARTED
    assert "no_such_module" in event.message


def test_a_cold_process_needs_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert last(Attempt(ColdStarter(), make_job(output_dir=tmp_path), function=TRAIN)).completed


def test_a_forked_process_really_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.workers import small

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    model, data = small.make_model(tmp_path / "model"), small.make_data(tmp_path / "data")
    warm = WarmServer()
    try:
        job = small.job(model, data, tmp_path / "out")
        event = last(start(warm, job, "autosft.workers.training.train:train"))
        assert event.completed, event.message
    finally:
        warm.close()
