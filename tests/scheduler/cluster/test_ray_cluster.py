"""A local Ray comes up private, and its parts may die; other people's clusters are used as guests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from autosft.profiles.errors import InterruptedRunError, UserError
from autosft.scheduler.cluster import ray_cluster as clusters
from autosft.scheduler.cluster import watchdog
from autosft.studies.trial import AttemptEnd, FailureKind, StopReason, TrialEvent
from autosft.workers.runner import TrialRunner
from tests.scheduler.processes import ROOT, TRAIN, is_gone, members, wait_for
from tests.workers.scripted import Fault, Script, make_job

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("num_failures", [2, 3])
def test_a_machine_too_busy_for_ray_gets_more_time(
    monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    import ray
    from ray._private import ray_constants

    starts: list[str] = []

    def init(**options: str) -> SimpleNamespace:
        assert not ray_constants.ENABLE_RAY_CLUSTER, "it listens on all interfaces"
        starts.append(options["_temp_dir"])
        if len(starts) <= num_failures:
            raise Exception("The current node timed out during startup.")
        info = {"gcs_address": "here:1", "node_ip_address": "127.0.0.1"}
        return SimpleNamespace(address_info=info, dashboard_url="")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(clusters, "_vital_processes", dict)
    with clusters.start_local(imports=[]) as cluster:
        if num_failures == 2:
            cluster.wait_until_ready()
            assert cluster.address == "here:1"
        else:
            with pytest.raises(InterruptedRunError, match="too busy"):
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
    from autosft.workers.processes.starters import WarmServer

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


# --- other people's clusters --------------------------------------------------------------------------

GUEST = f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    from autosft.profiles.errors import UserError
    from autosft.scheduler.cluster.ray_cluster import connect
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
    [("right", "completed"), ("wrong" * 8, "rejects our token"), (None, "rejects us without a token")],
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


# `ray start` replaces loopback addresses by reachable ones, at which a local Ray does not listen.
JOINING = """
from ray._private import services
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
main()
"""
ON_LOOPBACK = ("--node-ip-address=127.0.0.1", "--num-cpus=0")


@pytest.fixture
def second_node(cluster: clusters.Cluster, tmp_path: Path) -> str:
    """Join a second raylet of this machine, over loopback as the first; return its node id."""
    import ray

    assert cluster.address is not None
    run_dir = run_dir_of(cluster)
    subprocess.run(
        [sys.executable, "-c", JOINING, "start", f"--address={cluster.address}", *ON_LOOPBACK],
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


def test_a_ray_that_fails_is_told_from_a_bug() -> None:
    from ray.exceptions import RaySystemError

    with pytest.raises(InterruptedRunError, match="Failed to connect to GCS"), clusters._interrupted():
        raise RaySystemError("Failed to connect to GCS.\nmore")
    with pytest.raises(KeyError), clusters._interrupted():
        raise KeyError("ours")
