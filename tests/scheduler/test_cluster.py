"""A local Ray comes up private and goes away whole, whatever ends its driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from autosft.profiles.errors import UserError
from autosft.scheduler import cluster as clusters
from autosft.scheduler import watchdog
from autosft.scheduler.run_folder import clean_up_dead_runs
from autosft.studies.trial import AttemptEnd, FailureKind, StopReason, TrialEvent
from autosft.workers.runner import TrialRunner
from tests.workers.scripted import Fault, Script, make_job

ROOT = Path(__file__).parents[2]
TRAIN = "tests.workers.scripted:train"
LIMIT_S = 10.0  # within which nothing of a dead driver may be left

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def wait_for(condition: Callable[[], bool], *, timeout_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def members(run_dir: Path) -> list[int]:
    return watchdog.members(str(run_dir), spare=frozenset({os.getpid()}))


# --- whose process is it ------------------------------------------------------------------------------

SLEEP = "import signal, sys; print(flush=True); signal.pause()"


def sleeper(*, env: dict[str, str] | None = None, log: Path | None = None, program: str = SLEEP) -> int:
    """Start a process in a session of its own that sleeps; return once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=log.open("w") if log else None,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process.pid


def test_a_process_belongs_to_a_run_by_environment_by_open_file_or_by_descent(tmp_path: Path) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "run2"
    run_dir.mkdir()
    other.mkdir()
    by_environment = sleeper(env={"AUTOSFT_RUN": str(run_dir)})
    by_file = sleeper(log=run_dir / "log")
    parent = sleeper(
        log=run_dir / "log",
        program="import subprocess, sys, os, signal; null = open(os.devnull, 'w');"
        "subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'], stderr=null, stdout=null);"
        "print(flush=True); signal.pause()",
    )
    stranger = sleeper(env={"AUTOSFT_RUN": str(other)}, log=other / "log")
    try:
        [child] = psutil.Process(parent).children()
        assert set(members(run_dir)) == {by_environment, by_file, parent, child.pid}
        assert watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()})) == []
        assert all(is_gone(pid) for pid in (by_environment, by_file, parent, child.pid))
        assert not run_dir.exists()
        assert not is_gone(stranger)
    finally:
        os.kill(stranger, signal.SIGKILL)


def test_only_dead_runs_are_cleaned_up() -> None:
    program = """
        import os, subprocess, sys
        from autosft.scheduler.run_folder import run_folder
        with run_folder() as run_dir:
            subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"],
                             env={**os.environ, "AUTOSFT_RUN": str(run_dir)}, stdout=subprocess.DEVNULL)
            print(run_dir, flush=True)
            sys.stdin.read()
    """
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    run_dirs = [Path((d.stdout or sys.stdin).readline().strip().decode()) for d in drivers]  # type: ignore[union-attr]
    dead, living = drivers
    dead.kill()
    dead.wait()
    orphans = [pid for pid in members(run_dirs[0]) if pid != dead.pid]
    others = members(run_dirs[1])
    assert orphans
    assert others
    clean_up_dead_runs()
    assert all(is_gone(pid) for pid in orphans)
    assert not run_dirs[0].exists()
    assert run_dirs[1].exists()
    assert not any(is_gone(pid) for pid in others)
    watchdog.sweep(str(run_dirs[1]), spare=frozenset({os.getpid()}))
    living.wait()


@pytest.mark.parametrize("num_failures", [2, 3])
def test_a_machine_too_busy_for_ray_gets_more_time(
    monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    import ray

    starts: list[str] = []

    def init(**options: str) -> SimpleNamespace:
        starts.append(options["_temp_dir"])
        if len(starts) <= num_failures:
            raise Exception("The current node timed out during startup.")
        return SimpleNamespace(address_info={"gcs_address": "here:1"}, dashboard_url="")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(clusters, "_vital_processes", dict)
    with clusters.start_local(imports=[]) as cluster:
        if num_failures == 2:
            cluster.wait_until_ready()
            assert cluster.address == "here:1"
        else:
            with pytest.raises(UserError, match="too busy"):
                cluster.wait_until_ready()
    assert len(starts) == 3


# --- a cluster ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        with clusters.start_local(imports=["tests.workers.scripted"]) as started:
            started.wait_until_ready()
            yield started
            pids = members(run_dir_of(started))
            assert pids
        assert all(is_gone(pid) for pid in pids), "a process outlived the cluster"
        assert not list(Path(os.environ["HOME"]).iterdir()), "Ray wrote into the home folder"


def run_dir_of(cluster: clusters.Cluster) -> Path:
    from autosft.workers.process import WarmServer

    assert isinstance(cluster.starter, WarmServer)
    return cluster.starter.socket_path.parents[1]


@pytest.mark.ray
def test_without_the_token_ray_refuses(cluster: clusters.Cluster) -> None:
    grpc = pytest.importorskip("grpc")
    assert cluster.address is not None
    with grpc.insecure_channel(cluster.address) as channel:
        check_alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        with pytest.raises(grpc.RpcError) as refusal:
            check_alive(b"", timeout=5, wait_for_ready=True)
    assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.ray
def test_the_environment_is_left_as_it_was(cluster: clusters.Cluster) -> None:
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert watchdog.RUN_VARIABLE not in os.environ


def until_heard(runner: TrialRunner) -> Sequence[TrialEvent]:
    """Wait for events for as long as a busy machine may need to start an actor."""
    events = runner.events(200.0)
    assert events, "nothing happened"
    return events


def until_ends(runner: TrialRunner, num_ends: int) -> list[TrialEvent]:
    events: list[TrialEvent] = []
    while sum(isinstance(event, AttemptEnd) for event in events) < num_ends:
        events += until_heard(runner)
    return events


@pytest.mark.ray
def test_a_killed_actor_loses_its_attempt_and_no_other(cluster: clusters.Cluster, tmp_path: Path) -> None:
    runner = cluster.runner(function=TRAIN)
    try:
        runner.run(make_job(Script(fault=Fault.WAIT), trial=0, output_dir=tmp_path / "0"))
        until_heard(runner)
        [attempt], [actor] = attempts_of(cluster), actors_of(cluster)
        runner.run(make_job(Script(fault=Fault.WAIT), trial=1, output_dir=tmp_path / "1"))
        until_heard(runner)
        actor.kill()
        [*_, end] = until_ends(runner, 1)
        assert isinstance(end, AttemptEnd)
        assert (end.trial, end.failure) == (0, FailureKind.WORKER_LOST)
        assert is_gone(attempt.pid)
        runner.run(make_job(Script(), attempt=2, output_dir=tmp_path / "0"))
        runner.stop(1, 1, StopReason.USER)
        ends = {event.trial: event for event in until_ends(runner, 2) if isinstance(event, AttemptEnd)}
        assert ends[0].completed
        assert ends[1].stopped is StopReason.USER
    finally:
        runner.close(grace_s=0)


def attempts_of(cluster: clusters.Cluster) -> list[psutil.Process]:
    return psutil.Process(cluster.starter.pid).children()  # type: ignore[attr-defined]


def actors_of(cluster: clusters.Cluster) -> list[psutil.Process]:
    every = [psutil.Process(pid) for pid in members(run_dir_of(cluster))]
    return [process for process in every if "ray::TrialActor" in " ".join(process.cmdline())]


@pytest.mark.ray
def test_a_killed_server_loses_its_attempts_and_comes_back(cluster: clusters.Cluster, tmp_path: Path) -> None:
    runner = cluster.runner(function=TRAIN)
    try:
        runner.run(make_job(Script(fault=Fault.HANG), output_dir=tmp_path))
        until_heard(runner)
        [attempt] = attempts_of(cluster)
        psutil.Process(cluster.starter.pid).kill()  # type: ignore[attr-defined]
        [*_, end] = until_ends(runner, 1)
        assert isinstance(end, AttemptEnd)
        assert end.failure is FailureKind.WORKER_LOST
        wait_for(lambda: is_gone(attempt.pid))
        runner.run(make_job(Script(), attempt=2, output_dir=tmp_path))
        [*_, end] = until_ends(runner, 1)
        assert isinstance(end, AttemptEnd)
        assert end.completed
    finally:
        runner.close(grace_s=0)


@pytest.mark.ray
def test_closing_a_runner_ends_what_runs(cluster: clusters.Cluster, tmp_path: Path) -> None:
    runner = cluster.runner(function=TRAIN)
    runner.run(make_job(Script(fault=Fault.HANG), output_dir=tmp_path))
    until_heard(runner)
    [attempt] = attempts_of(cluster)
    runner.close(grace_s=0)
    assert is_gone(attempt.pid)


# --- a driver that dies -------------------------------------------------------------------------------

DRIVER = f"""
    import signal
    import sys
    # Tests that run in the background of a shell inherit an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.path.insert(0, {str(ROOT)!r})
    from autosft.scheduler.cluster import start_local
    from tests.workers.scripted import Fault, Script, make_job
    with start_local(imports=["tests.workers.scripted"]) as cluster:
        runner = cluster.runner(function={TRAIN!r})
        runner.run(make_job(Script(fault=Fault.HANG), output_dir=sys.argv[1]))
        runner.events(200.0)
        print(cluster.starter.socket_path.parents[1], flush=True)
        if sys.argv[2] == "raise":
            sys.stdin.readline()
            raise SystemError("a bug")
        while True:
            runner.events(60.0)
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("raise", marks=pytest.mark.slow),
    ],
)
def test_nothing_outlives_a_driver(tmp_path: Path, how: signal.Signals | str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path), str(how)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "stderr").open("w"),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert driver.stdout is not None
    run_dir = Path(driver.stdout.readline().decode().strip())
    assert run_dir.is_dir(), (tmp_path / "stderr").read_text()
    ours = members(run_dir)
    names = " ".join(" ".join(psutil.Process(pid).cmdline()) for pid in ours)
    for name in ("raylet", "gcs_server", "DashboardAgent", "RuntimeEnvAgent", "TrialActor", "warm_server"):
        assert name in names, f"{name} is not known to belong to the run"
    started = time.monotonic()
    if how == signal.SIGINT:
        os.killpg(driver.pid, signal.SIGINT)  # as the terminal does
    elif isinstance(how, signal.Signals):
        driver.send_signal(how)
    else:
        assert driver.stdin is not None
        driver.stdin.close()
    wait_for(lambda: driver.poll() is not None and all(is_gone(pid) for pid in ours))
    wait_for(lambda: not run_dir.exists())
    assert time.monotonic() - started < LIMIT_S
    assert members(run_dir) == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_handler_of_sigterm_stays_in_place(tmp_path: Path) -> None:
    handler = """
        import signal
        def leave(*_):
            print("handled")
            raise KeyboardInterrupt
        signal.signal(signal.SIGTERM, leave)
    """
    program = textwrap.dedent(handler) + textwrap.dedent(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert driver.stdout is not None
    run_dir = Path(driver.stdout.readline().decode().strip())
    driver.terminate()
    said, errors = driver.communicate(timeout=LIMIT_S)
    assert said == b"handled\n"
    assert b"SIGTERM received" not in errors, "Ray's own handler has run"
    assert members(run_dir) == []


@pytest.mark.ray
def test_leaving_at_once_does_not_wait_for_ray_and_leaves_nothing() -> None:
    program = """
        from autosft.scheduler.cluster import start_local
        with start_local(imports=[]) as cluster:
            print(cluster.starter.socket_path.parents[1])
            raise SystemExit(2)
    """
    left = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert left.returncode == 2
    assert left.stderr == "", "Ray's words reached the terminal"
    run_dir = Path(left.stdout.strip())
    assert not run_dir.exists()
    assert members(run_dir) == []


# --- other people's clusters --------------------------------------------------------------------------

GUEST = f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from autosft.profiles.errors import UserError
    from autosft.scheduler.cluster import connect
    from tests.workers.scripted import Script, make_job
    try:
        with connect(sys.argv[1], imports=["tests.workers.scripted"]) as cluster:
            runner = cluster.runner(function={TRAIN!r})
            runner.run(make_job(Script(num_steps=1), output_dir=sys.argv[2]))
            while not (events := runner.events(200.0)) or not hasattr(events[-1], "completed"):
                pass
            print("completed" if events[-1].completed else events[-1])
            runner.close(grace_s=0)
    except UserError as error:
        print(error)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "words"),
    [("right", "completed"), ("wrong" * 8, "refuses our token"), (None, "refuses us without a token")],
    ids=["right token", "wrong token", "no token"],
)
def test_a_running_cluster_takes_guests_with_its_token(
    cluster: clusters.Cluster, tmp_path: Path, token: str | None, words: str
) -> None:
    assert cluster.address is not None
    variables = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    if token is not None:
        own = (run_dir_of(cluster) / "token").read_text()
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": own if token == "right" else token}
    guest = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GUEST), cluster.address, str(tmp_path)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert words in guest.stdout, guest.stderr
    assert guest.returncode == 0
    assert "Traceback" not in guest.stderr
    assert cluster.is_up


def is_server(process: psutil.Process) -> bool:
    """Whether it is a warm server and not one of its children."""
    return os.getsid(process.pid) == process.pid and "warm_server" not in str(process.parent().cmdline())


@pytest.fixture
def second_node(cluster: clusters.Cluster, tmp_path: Path) -> str:
    """Join a second raylet of this machine; return its node id."""
    import ray

    assert cluster.address is not None
    run_dir = run_dir_of(cluster)
    subprocess.run(
        [Path(sys.executable).with_name("ray"), "start", f"--address={cluster.address}", "--num-cpus=0"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "AUTOSFT_RUN": str(run_dir),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(run_dir / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
        check=True,
    )
    here = ray.get_runtime_context().get_node_id()
    [other] = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    return str(other)


@pytest.mark.ray
@pytest.mark.slow
def test_attempts_run_on_the_node_of_their_device(
    cluster: clusters.Cluster, second_node: str, tmp_path: Path
) -> None:
    there = {"device_uuids": ("CPU-there",)}
    runner = cluster.runner(
        function=TRAIN, node_of={"CPU-there": second_node}, imports=["tests.workers.scripted"]
    )
    try:
        runner.run(replace(make_job(Script(), output_dir=tmp_path / "0"), **there))  # type: ignore[arg-type]
        [*_, end] = until_ends(runner, 1)
        assert isinstance(end, AttemptEnd)
        assert end.completed
        waiting = make_job(Script(fault=Fault.WAIT), trial=1, output_dir=tmp_path / "1")
        runner.run(replace(waiting, **there))  # type: ignore[arg-type]
        until_heard(runner)
        assert attempts_of(cluster) == [], "it runs on the server of this node"
        ours = {
            psutil.Process(pid): str(psutil.Process(pid).cmdline()) for pid in members(run_dir_of(cluster))
        }
        [raylet] = [p for p, line in ours.items() if p.name() == "raylet" and second_node in line]
        servers = [p for p, line in ours.items() if "warm_server" in line and is_server(p)]
        raylet.kill()
        [*_, end] = until_ends(runner, 1)
        assert isinstance(end, AttemptEnd)
        assert (end.trial, end.failure) == (1, FailureKind.WORKER_LOST)
        assert len(servers) == 2
        assert [p.pid for p in servers if not is_gone(p.pid)] == [cluster.starter.pid]  # type: ignore[attr-defined]
    finally:
        runner.close(grace_s=0)


@pytest.mark.parametrize(
    ("address", "words"), [("nowhere", "HOST:PORT"), ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1")]
)
def test_a_wrong_address_is_refused_at_once(address: str, words: str) -> None:
    with pytest.raises(UserError, match=words), clusters.connect(address):
        pass
