"""What a local Ray and its trials listen on: loopback alone, and with no answer for one without the token."""

from __future__ import annotations

import importlib
import os
import pkgutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware import local_sockets
from autosft.scheduler.cluster.loopback import bound_elsewhere, is_loopback_address
from autosft.scheduler.cluster.ray_cluster import Cluster, start_local
from tests.scheduler.cluster import waiting_ranks
from tests.scheduler.processes import ROOT, members
from tests.workers.scripted import Fault, Script, make_job

grpc = pytest.importorskip("grpc")

#: Sockets that may listen elsewhere: the process's title, and why.
EXCEPTIONS: dict[str, str] = {}

#: What listens in a study, by a word of its command line.
LISTENERS = {
    "this process": "the driver",
    "gcs_server": "Ray's head",
    "raylet/raylet": "Ray's node",
    "dashboard/dashboard.py": "Ray's dashboard",
    "ray::DashboardAgent": "Ray's agents",
    "ray::RuntimeEnvAgent": "Ray's agents",
    "ray::TrialActor": "an actor, which is one of Ray's workers",
    "warm_server": "ranks of a gang",
}

#: Methods that read, by how their names begin: of each service, the first is called.
READS = ("Get", "List", "Check", "Health", "Num")
#: Of services that have none of these, one that does nothing when it is given nothing.
HARMLESS = {
    "AddEvents",
    "Datapath",
    "GcsSubscriberPoll",
    "Logstream",
    "PinRuntimeEnvURI",
    "PubsubLongPolling",
}
#: Has no description that is installed.
OBJECT_MANAGER = "/ray.rpc.ObjectManagerService/Pull"
#: Served only for Ray's client and its autoscaler, which a local Ray starts none of; the last by no program.
NOT_THERE = {
    "RayletDriver",
    "RayletDataStreamer",
    "RayletLogStreamer",
    "InstanceManagerService",
    "SubscriberService",
}
#: Tells that a process lives, and no more; Ray's own probes ask it without a token.
HEALTH = "/grpc.health.v1.Health/Check"
#: What the dashboard, the agents and Ray's metrics serve.
PATHS = (
    "/api/jobs/",
    "/api/v0/nodes",
    "/nodes",
    "/logs",
    "/metrics",
    "/get_or_create_runtime_env",
    "/get_runtime_envs_info",
)


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket of a study's processes."""

    what: str  # the process
    ip: str
    port: int

    @property
    def kind(self) -> str:
        return next((word for word in LISTENERS if word in self.what), self.what)


def listening(cluster: Cluster) -> Iterator[Listener]:
    """Yield the listening sockets of a run, of what its processes have started, and of this process."""
    run_dir = cluster.starter.socket_path.parents[1]  # type: ignore[attr-defined]
    found = {os.getpid(): psutil.Process()}
    for pid in members(run_dir):
        process = psutil.Process(pid)
        found |= {item.pid: item for item in (process, *process.children(recursive=True))}
    for pid, process in found.items():
        what = "this process" if pid == os.getpid() else " ".join(process.cmdline())
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield Listener(what, connection.laddr.ip, connection.laddr.port)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Give a Ray with its dashboard and a trial of two ranks that trains."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        module = waiting_ranks.__name__
        with start_local(imports=[module], dashboard=True) as started:
            started.wait_until_ready()
            runner = started.runner(function=f"{module}:train")
            gang = {"output_dir": tmp_path_factory.mktemp("out"), "device_uuids": ("CPU-0", "CPU-1")}
            runner.run(make_job(Script(fault=Fault.WAIT), **gang))
            assert runner.events(200.0), "nothing happened"
            yield started
            runner.close(grace_s=0)


@pytest.fixture(scope="module")
def listeners(cluster: Cluster) -> list[Listener]:
    return list(listening(cluster))


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.ray
@pytest.mark.slow
def test_every_socket_listens_on_loopback_alone(listeners: list[Listener]) -> None:
    assert {item.kind for item in listeners} == set(LISTENERS), "others listen, or one no longer does"
    elsewhere = [
        item for item in listeners if not is_loopback_address(item.ip) and item.kind not in EXCEPTIONS
    ]
    assert elsewhere == []


@pytest.mark.ray
@pytest.mark.slow
def test_the_dashboard_page_is_for_this_machine(cluster: Cluster) -> None:
    assert cluster.dashboard_url is not None
    assert is_loopback_address(socket.gethostbyname(cluster.dashboard_url.partition(":")[0]))


# --- what a stranger on this machine is answered ------------------------------------------------------


def methods() -> Iterator[str]:
    """Yield one harmless method of each service that this Ray describes."""
    import ray.core.generated as generated

    yield OBJECT_MANAGER
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2"):
            described = importlib.import_module(f"{generated.__name__}.{module.name}").DESCRIPTOR
            for service in described.services_by_name.values():
                names = sorted(method.name for method in service.methods)
                harmless = [name for name in names if name.startswith(READS) or name in HARMLESS]
                assert harmless, f"{service.full_name} is new: name a method of it in HARMLESS"
                yield f"/{service.full_name}/{harmless[0]}"


def grpc_answers(address: str, asked: list[str]) -> dict[str, str]:
    """Return what a gRPC server says to each method without a token; empty where there is none."""
    answers = {}
    with grpc.insecure_channel(address) as channel:
        for method in (HEALTH, *asked):
            try:
                channel.unary_unary(method)(b"", timeout=5)
                answers[method] = "OK"
            except grpc.RpcError as error:
                answers[method] = error.code().name
            if method == HEALTH and answers[method] in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                return {}
    return answers


def http_answers(address: str) -> dict[str, int]:
    """Return the status of each path without a token; empty where nobody speaks HTTP."""
    answers = {}
    for path in PATHS:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
                answers[path] = answer.status
        except urllib.error.HTTPError as error:
            answers[path] = error.code
    return answers


@pytest.mark.ray
@pytest.mark.slow
def test_no_service_serves_a_stranger(cluster: Cluster, listeners: list[Listener]) -> None:
    """Ask every service that this Ray knows, at each of its ports, without the token."""
    asked, heard = list(methods()), set()
    for item in (item for item in listeners if item.kind != "warm_server"):
        address = f"127.0.0.1:{item.port}"
        if answers := grpc_answers(address, asked):
            refused = {method for method, code in answers.items() if code == "UNAUTHENTICATED"}
            others = {method: code for method, code in answers.items() if method not in refused}
            others.pop(HEALTH, None)
            assert refused, f"{item}: {answers}"
            assert set(others.values()) <= {"UNIMPLEMENTED"}, f"{item}: {others}"
            heard |= refused
        else:
            refusals = http_answers(address)
            assert set(refusals.values()) <= {401}, f"{item}: {refusals}"
            heard.add("HTTP")
    cluster.wait_until_ready()  # nothing of it has died of being asked
    silent = {method for method in asked if method not in heard}
    assert {method.split("/")[1].rpartition(".")[2] for method in silent} == NOT_THERE
    assert "HTTP" in heard


# --- how ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:10.0.0.5", False),
        ("10.0.0.5", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_which_addresses_are_loopback(host: str, expected: bool) -> None:
    assert is_loopback_address(host) is expected


def test_a_ray_that_listens_elsewhere_is_refused() -> None:
    """A later version may no longer take its address as it does now."""
    assert bound_elsewhere({"node_ip_address": "127.0.0.1"}) is None
    error = bound_elsewhere({"node_ip_address": "10.0.0.5"})
    assert isinstance(error, UserError)
    assert "listens on 10.0.0.5" in str(error)


def test_ranks_of_one_machine_meet_on_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in local_sockets.INTERFACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    wanted = local_sockets.local_only()
    assert set(wanted) == {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    name = wanted["GLOO_SOCKET_IFNAME"]
    assert wanted["NCCL_SOCKET_IFNAME"] == f"={name}"
    assert any(is_loopback_address(item.address) for item in psutil.net_if_addrs()[name])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    assert set(local_sockets.local_only()) == {"GLOO_SOCKET_IFNAME"}, "what the user has set stays"
