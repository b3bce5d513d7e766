"""Ray clusters for tests: a head and further raylets on this machine, private, and swept away at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from autosft.scheduler.cluster import watchdog

ROOT = Path(__file__).parents[1]

#: A dead node is noticed within about two seconds instead of thirty.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}

#: `ray start` waits for minutes for a head that has died under it.
START_LIMIT_S = 300.0


@dataclass(slots=True)
class RayNodes:
    """A cluster that was started with `ray start`, as an administrator would."""

    folder: Path  # its processes belong to this run folder
    token: str
    address: str = ""  # of the head, HOST:PORT
    dashboard: str = ""  # HOST:PORT

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to use the cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start_head(self, *, dashboard: bool = False) -> None:
        port, dashboard_port = free_ports(2)
        self._start(
            "--head",
            f"--port={port}",
            f"--dashboard-port={dashboard_port}",
            f"--include-dashboard={'true' if dashboard else 'false'}",
            f"--temp-dir={self.folder / 'ray'}",
        )
        self.address = f"127.0.0.1:{port}"
        self.dashboard = f"127.0.0.1:{dashboard_port}"

    def is_answering(self) -> bool:
        """Whether the head takes connections; one that was asked to end may live on for minutes without."""
        host, _, port = self.address.partition(":")
        with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), timeout=5):
            return True
        return False

    def add(self, variables: Mapping[str, str] | None = None) -> None:
        """Join one more raylet."""
        self._start(f"--address={self.address}", variables=variables)

    def _start(self, *options: str, variables: Mapping[str, str] | None = None) -> None:
        ended = subprocess.run(
            [
                Path(sys.executable).with_name("ray"),
                "start",
                *options,
                "--node-ip-address=127.0.0.1",
                "--num-cpus=1",
                "--object-store-memory=80000000",
                # Fixed by default: the agent of a second Ray on this machine ends without it.
                f"--dashboard-agent-listen-port={free_ports(1)[0]}",
                "--disable-usage-stats",
            ],
            env={
                **os.environ,
                **self.environment,
                **QUICK_HEALTH_CHECKS,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                watchdog.RUN_VARIABLE: str(self.folder),
                "RAY_enable_metrics_collection": "0",
                **(variables or {}),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=START_LIMIT_S,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    def kill(self) -> None:
        """Kill everything that belongs to the cluster."""
        watchdog.sweep(str(self.folder), spare=frozenset({os.getpid()}))
        self.folder.mkdir(mode=0o700)


@contextlib.contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """Give a cluster without nodes; nothing of it is left afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))  # short: Unix sockets lie below it
    try:
        yield RayNodes(folder=folder, token=secrets.token_hex(32))
    finally:
        watchdog.sweep(str(folder), spare=frozenset({os.getpid()}))
        shutil.rmtree(folder, ignore_errors=True)


#: Below the ports that Linux gives to outgoing connections, above those of Ray's own workers.
FIRST_PORT, LAST_PORT = 20_000, 32_767


def free_ports(number: int) -> list[int]:
    """Return ports that nobody listens on and that no outgoing connection will be given."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < number:
            port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT + 1)
            listener = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                found.append(port)
    return found
