"""Every port that a local Ray opens refuses a stranger: a connection without the token."""

from __future__ import annotations

import os
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from autosft.scheduler.cluster import watchdog
from autosft.scheduler.cluster.ray_cluster import start_local

grpc = pytest.importorskip("grpc")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

#: One method of each service that some process of Ray serves.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck",
)
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


def listening(run_dir: Path) -> Iterator[tuple[str, str, int]]:
    """Yield the listening sockets of a run and of this process: what it is, address, port."""
    own = [os.getpid(), *watchdog.members(str(run_dir), spare=frozenset({os.getpid()}))]
    for pid in own:
        process = psutil.Process(pid)
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield " ".join(process.cmdline())[:60], connection.laddr.ip, connection.laddr.port


def grpc_answers(address: str) -> dict[str, str]:
    """Return what a gRPC server says to each method without a token; empty where there is none."""
    answers = {}
    with grpc.insecure_channel(address) as channel:
        for method in (*METHODS, HEALTH):
            try:
                channel.unary_unary(method)(b"", timeout=5)
                answers[method] = "OK"
            except grpc.RpcError as error:
                answers[method] = error.code().name
    return {} if set(answers.values()) <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"} else answers


def http_answers(address: str) -> dict[str, int]:
    answers = {}
    for path in PATHS:
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
                answers[path] = answer.status
        except urllib.error.HTTPError as error:
            answers[path] = error.code
    return answers


def test_no_port_serves_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with start_local(imports=[], dashboard=True) as cluster:
        cluster.wait_until_ready()
        run_dir = cluster.starter.socket_path.parents[1]  # type: ignore[attr-defined]
        seen = set()
        for process, ip, port in listening(run_dir):
            address = f"{'127.0.0.1' if ip in ('::', '0.0.0.0') else ip}:{port}"
            answers = grpc_answers(address)
            if answers:
                assert "UNAUTHENTICATED" in answers.values(), f"{process} at {address}: {answers}"
                served = [method for method, code in answers.items() if code == "OK"]
                assert served in ([], [HEALTH]), f"{process} at {address}: {answers}"
                seen.add("gRPC")
            else:
                refusals = http_answers(address)
                assert set(refusals.values()) <= {401}, f"{process} at {address}: {refusals}"
                seen.add("HTTP")
            print(f"{process:60}  {ip}:{port}  {answers or refusals}")
        assert seen == {"gRPC", "HTTP"}, "nothing was asked"
        assert cluster.dashboard_url is not None
        host = cluster.dashboard_url.partition(":")[0]
        assert socket.gethostbyname(host).startswith("127."), "the dashboard's page is for this machine alone"
