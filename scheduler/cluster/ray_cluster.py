"""Ray on this machine for as long as a command runs, or an existing cluster.

A local Ray is private: it listens on loopback alone, has its own token, no dashboard unless requested, no
telemetry, no logs on the terminal, all files in one folder.  However the command ends, nothing of it is left
after ten seconds: a regular exit kills everything, and a watchdog does it for a driver that died.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autosft.profiles.errors import InterruptedRunError, UserError
from autosft.scheduler.cluster import watchdog
from autosft.scheduler.cluster.asking_nodes import Onlooker, alive_nodes, run_on
from autosft.scheduler.cluster.loopback import (
    BINDING,
    bound_elsewhere,
    is_loopback_address,
    on_loopback,
    require_loopback,
)
from autosft.scheduler.cluster.own_signals import keep_handlers_out, own_sigterm
from autosft.scheduler.cluster.run_folder import guarded, run_folder
from autosft.workers.processes.starters import WARM_IMPORTS, Starter, WarmServer
from autosft.workers.runner import TrialRunner

# Plasma's minimum size.  Our events are small and are sent inside messages.
OBJECT_STORE_BYTES = 80 << 20

# Ray gives its node 30 s to start, which may be too short for a machine under heavy load.
MAX_STARTS = 3

# One token per process: Ray caches it, so that a second cluster of this process must use the same one.
_TOKEN = secrets.token_hex(32)


@dataclass(slots=True)
class Cluster:
    """A Ray cluster that this process uses; valid inside `start_local` or `connect`."""

    starter: Starter  # the warm server of this machine
    address: str | None = None  # once ready
    dashboard_url: str | None = None
    start_s: float | None = None  # time that Ray took to start
    is_guest: bool = False  # whether other programs use the cluster too
    _is_up: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)  # vital for Ray
    _lost: str = ""  # which of them has died

    @property
    def is_up(self) -> bool:
        """Whether Ray is up."""
        return self._is_up.is_set() and self._error is None

    def wait_until_ready(self) -> None:
        """Wait until Ray is up.

        Raises the error that prevented its start, and InterruptedRunError once a part of it has died: Ray
        itself would wait a minute and then end this process without an exception.
        """
        self._is_up.wait()
        if self._error is not None:
            raise self._error
        for name, process in self._processes.items():
            if process.poll() is not None:
                self._lost = f"Ray's {name} has died ({_way_of(process.returncode)})"
        if self._lost:
            raise InterruptedRunError(
                f"{self._lost}. Nothing that was recorded is lost: run the same command again to resume."
            )
        if threading.current_thread() is threading.main_thread():
            # Ray's C++ code has replaced Python's handler by one that prints a stack and exits.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def other_nodes(self) -> dict[str, str]:
        """Return the names of the other live nodes, by Ray's node id."""
        if not self.is_guest:
            return {}
        alive, is_here = alive_nodes()
        if not is_here:
            self._lost = "this machine's raylet has died"
        return alive

    def on_node(self, node: str, function: Callable[..., Any], *arguments: object) -> Future[Any]:
        """Run a function on a node."""
        return run_on(node, function, *arguments)

    def runner(self, **options: Any) -> TrialRunner:
        """Return a runner of trials on this cluster; options as in `RayTrialRunner`."""
        from autosft.workers.runners.ray_runner import RayTrialRunner

        return RayTrialRunner(self.starter, wait_until_ready=self.wait_until_ready, **options)


@contextlib.contextmanager
def start_local(*, imports: Sequence[str] = WARM_IMPORTS, dashboard: bool = False) -> Iterator[Cluster]:
    """Start a private Ray on this machine; no process of it outlives the block.

    Returns at once: Ray (3-5 s) and the warm server (4-6 s) start concurrently, and callers wait when they
    need them.  Raises UserError without an IPv4 loopback.
    """
    require_loopback()
    with run_folder() as run_dir, guarded(run_dir):
        with _environment({watchdog.RUN_VARIABLE: str(run_dir)}):
            starter = WarmServer(run_dir / "warm", imports=imports)
        cluster = Cluster(starter=starter)
        leave = threading.Event()
        _wait_for_abandoned_start()
        ray_thread = threading.Thread(
            target=_own_ray, args=(cluster, run_dir, dashboard, leave), name="ray", daemon=True
        )
        ray_thread.start()
        try:
            with _interrupted():
                yield cluster
        finally:
            leave.set()
            starter.close()
            if not cluster.is_up and _is_starting_processes():
                _abandoned.append(ray_thread)  # an invalid request should not have to wait for Ray
            else:
                ray_thread.join()
            watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()}))


@contextlib.contextmanager
def _interrupted() -> Iterator[None]:
    """Tell a Ray that has died under its user from a bug: what its runner expects, it handles itself."""
    try:
        yield
    except Exception as error:
        if type(error).__module__ != "ray.exceptions":
            raise
        raise InterruptedRunError(
            f"Ray has failed: {_first_line(error)} "
            "Nothing that was recorded is lost: run the same command again to resume."
        ) from error


# Threads whose Ray was killed during its start.  They end by themselves.
_abandoned: list[threading.Thread] = []


def _wait_for_abandoned_start() -> None:
    while _abandoned:
        _abandoned.pop().join()


def _is_starting_processes() -> bool:
    """Whether `ray.init` has not begun to connect yet; after that, Ray would abort this process if killed."""
    worker = sys.modules.get("ray._private.worker")
    return getattr(worker, "_global_node", None) is None  # also while it is being imported


def _own_ray(cluster: Cluster, run_dir: Path, dashboard: bool, leave: threading.Event) -> None:
    """Start Ray, keep it running, stop it.

    All in one thread that lives as long as Ray: the kernel kills Ray's processes together with the thread
    that started them, not with its process.
    """
    started = time.monotonic()
    try:
        with _environment(_ray_environment(run_dir)), own_sigterm():
            import ray

            keep_handlers_out(ray._raylet.__file__)
            _log_to(run_dir / "ray.log")
            from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

            # Ray reads both on import, which may have happened already; ray.init does the same.
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()
            with on_loopback():
                context = _init_ray(run_dir, dashboard, leave)
        cluster._error = bound_elsewhere(context.address_info)
        cluster.address = context.address_info["gcs_address"]
        cluster.dashboard_url = context.dashboard_url or None
        cluster.start_s = time.monotonic() - started
        cluster._processes = _vital_processes()
    except BaseException as error:  # passed on to waiting threads
        cluster._error = error
        return
    finally:
        cluster._is_up.set()
    leave.wait()
    ray.shutdown()


def _init_ray(run_dir: Path, dashboard: bool, leave: threading.Event) -> Any:
    """Call `ray.init`, with retries if the machine was too busy for Ray's fixed timeout of 30 s."""
    import ray

    for _ in range(MAX_STARTS):
        try:
            return ray.init(
                address="local",  # regardless of RAY_ADDRESS
                num_cpus=1,  # workers to start in advance; our actors request none, since we place trials
                num_gpus=0,  # Ray must not look for GPUs: trials get theirs by UUID
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=dashboard,
                log_to_driver=False,
                _temp_dir=str(run_dir / "ray"),
                job_config=without_user_folders(),
            )
        except Exception as error:  # Ray raises nothing narrower
            if "timed out during startup" not in str(error) or leave.is_set():
                raise
            watchdog.sweep(str(run_dir / "ray"), spare=frozenset({os.getpid()}))
    raise InterruptedRunError(
        f"Ray did not start in {MAX_STARTS} attempts of 30 s: the machine is too busy. "
        "Wait until other programs use less CPU, and run the same command again."
    )


def without_user_folders() -> Any:
    """Return a Ray job's configuration that keeps the driver's current folder off its workers' path.

    Ray puts it, and the folder of the driver's script, before everything else: a user's `queue.py` there
    would shadow Python's.  Ray does not do so for jobs with a working folder.
    """
    from ray.job_config import JobConfig

    class NoFolders(JobConfig):  # type: ignore[misc]
        def _runtime_env_has_working_dir(self) -> bool:
            return True

    return NoFolders()


def _vital_processes() -> dict[str, subprocess.Popen[bytes]]:
    """Return the processes of the Ray node that this process has started, by name."""
    from ray._private import ray_constants, worker

    started = worker._global_node.all_processes
    names = (ray_constants.PROCESS_TYPE_GCS_SERVER, ray_constants.PROCESS_TYPE_RAYLET)
    return {name: started[name][0].process for name in names if name in started}


def _way_of(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


def _log_to(path: Path) -> None:
    """Redirect the output of Ray's Python code to a file: the terminal is for the user, or for `--json`.

    Otherwise, pages of messages about dying workers and raylets go to standard output.
    """
    from ray._private import worker

    worker._worker_logs_enabled = False
    logger = logging.getLogger("ray")
    logger.handlers = [logging.FileHandler(path, delay=True)]
    logger.propagate = False


def _ray_environment(run_dir: Path) -> dict[str, str]:
    token_path = run_dir / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(_TOKEN)
    return {
        **BINDING,
        watchdog.RUN_VARIABLE: str(run_dir),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        # Its autoscaler and dashboard would publish their metrics to anybody who asks; without a port they
        # do not.
        "AUTOSCALER_METRIC_PORT": "-1",
        "DASHBOARD_METRIC_PORT": "-1",
        # To tell a dead control service of its tasks, Ray would wait for 5 s: ray.shutdown() took 7.6 s, and
        # 2.7 s with this (2.60, beside a load of 22 on two cores).
        "RAY_task_events_shutdown_flush_timeout_ms": "200",
        # Trials are not Ray's processes: its memory monitor could only kill the small actors next to them.
        "RAY_memory_monitor_refresh_ms": "0",
        # Otherwise Ray copies `uv run`'s environment for every worker.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


@contextlib.contextmanager
def connect(
    address: str, *, imports: Sequence[str] = WARM_IMPORTS, timeout_s: float = 5.0
) -> Iterator[Cluster]:
    """Use a running Ray cluster that this machine is a node of (`HOST:PORT`, or "auto" to find it).

    Raises UserError if nothing answers there, if it is not Ray, or if the token is not the cluster's.
    """
    import ray

    with run_folder() as run_dir:
        _log_to(run_dir / "ray.log")
        if address != "auto":
            _refuse_bad_address(address, timeout_s)
        with guarded(run_dir), _environment({watchdog.RUN_VARIABLE: str(run_dir)}):
            starter = WarmServer(run_dir / "warm", imports=imports)
            try:
                with _interrupted():
                    yield _connected(address, starter)
            finally:
                ray.shutdown()
                starter.close()
                watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()}))


@contextlib.contextmanager
def look_at(address: str, *, timeout_s: float = 5.0) -> Iterator[Onlooker]:
    """Ask the nodes of a running cluster; raises as `connect`."""
    import ray

    with run_folder() as run_dir:
        _log_to(run_dir / "ray.log")
        if address != "auto":
            _refuse_bad_address(address, timeout_s)
        try:
            _join(address)
            yield Onlooker()
        finally:
            ray.shutdown()


def _connected(address: str, starter: WarmServer) -> Cluster:
    started = time.monotonic()
    context = _join(address)
    cluster = Cluster(
        starter=starter,
        is_guest=True,
        address=context.address_info["gcs_address"],
        dashboard_url=context.dashboard_url or None,
        start_s=time.monotonic() - started,
    )
    cluster._is_up.set()
    cluster.wait_until_ready()
    return cluster


def _join(address: str) -> Any:
    """Call `ray.init` for a running cluster.  Raises UserError."""
    import ray

    keep_handlers_out(ray._raylet.__file__)
    as_given = on_loopback() if is_loopback_address(address.rpartition(":")[0]) else contextlib.nullcontext()
    try:
        with as_given, own_sigterm():  # Ray's ends the process before a trial can save a checkpoint
            return ray.init(address=address, log_to_driver=False, job_config=without_user_folders())
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"the Ray cluster at {address} cannot be used from here: {_first_line(error)}",
            remedy="This machine must be one of its nodes: run `ray start --address=HOST:PORT` first.",
        ) from error


def _refuse_bad_address(address: str, timeout_s: float) -> None:
    """Check that the head is up and accepts our token: `ray.init` would retry for 20 s and give no reason."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--address {address!r} is not HOST:PORT.", remedy="Example: --address 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address}: {error}.",
            remedy="Check the address that `ray start --head` printed, and the firewall.",
        ) from error
    import grpc  # type: ignore[import-untyped]
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    token = AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True)
    with grpc.insecure_channel(address) as channel:
        check_alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            check_alive(b"", timeout=timeout_s, metadata=tuple(token.items()))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(
                    f"the Ray cluster at {address} rejects {'our token' if token else 'us without a token'}.",
                    remedy="Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of that cluster.",
                ) from error
            raise UserError(
                f"what answers at {address} is not the head of a Ray cluster ({error.code().name}).",
                remedy="Use the port that `ray start --head` printed, 6379 by default.",
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that the block starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
