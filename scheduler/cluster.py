"""Ray on this machine for as long as a command runs, or a cluster that is there already.

A local Ray is private: a token of its own, no dashboard unless asked for, no telemetry, no logs on the
terminal, all files in one folder.  When the command ends, however it ends, nothing of it is left after ten
seconds: on the way out everything is killed here, and a watchdog does it for a driver that died.  Ray itself
listens on every interface whatever it is told; the token is what protects it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from autosft.profiles.errors import UserError
from autosft.scheduler import watchdog
from autosft.workers.process import WARM_IMPORTS, Starter, WarmServer
from autosft.workers.runner import TrialRunner

# Plasma's smallest size.  Our events are small and travel inside messages.
OBJECT_STORE_BYTES = 80 << 20

# Ray gives its node 30 s to start, which a machine under heavy load may not make.
MAX_STARTS = 3

# One token a process: Ray caches it, so that a second cluster of this process must have the same.
_TOKEN = secrets.token_hex(32)


@dataclass(slots=True)
class Cluster:
    """A Ray cluster that this process uses; valid inside `start_local` or `connect`."""

    starter: Starter  # the warm server of this machine
    address: str | None = None  # once ready
    dashboard_url: str | None = None
    start_s: float | None = None  # how long Ray took to start
    _is_up: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None

    @property
    def is_up(self) -> bool:
        """Whether Ray serves."""
        return self._is_up.is_set() and self._error is None

    def wait_until_ready(self) -> None:
        """Wait until Ray serves.  Raises what kept it from starting."""
        self._is_up.wait()
        if self._error is not None:
            raise self._error
        if threading.current_thread() is threading.main_thread():
            # Ray's C++ has put a handler in Python's place that prints a stack and dies.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))

    def runner(self, **options: Any) -> TrialRunner:
        """Return a runner of trials on this cluster; options as of `RayTrialRunner`."""
        from autosft.workers.actor import RayTrialRunner

        return RayTrialRunner(self.starter, wait_until_ready=self.wait_until_ready, **options)


@contextlib.contextmanager
def start_local(*, imports: Sequence[str] = WARM_IMPORTS, dashboard: bool = False) -> Iterator[Cluster]:
    """Start a private Ray on this machine; on the way out no process of it is left.

    Returns at once: Ray (3-5 s) and the warm server (4-6 s) start side by side, and whoever needs them waits.
    """
    with run_folder() as run_dir, _watchdog(run_dir):
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
            yield cluster
        finally:
            leave.set()
            starter.close()
            if not cluster.is_up and _is_starting_processes():
                _abandoned.append(ray_thread)  # a bad request should not have to wait for Ray
            else:
                ray_thread.join()
            watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()}))


# Threads whose Ray was killed while it started.  They notice in their own time.
_abandoned: list[threading.Thread] = []


def _wait_for_abandoned_start() -> None:
    while _abandoned:
        _abandoned.pop().join()


def _is_starting_processes() -> bool:
    """Whether `ray.init` has not begun to connect yet; Ray would abort this process if killed after that."""
    worker = sys.modules.get("ray._private.worker")
    return getattr(worker, "_global_node", None) is None  # also while it is being imported


def _own_ray(cluster: Cluster, run_dir: Path, dashboard: bool, leave: threading.Event) -> None:
    """Start Ray, keep it, stop it.

    All in one thread that lives as long as Ray: the kernel kills Ray's processes with the thread that started
    them, not with its process.
    """
    started = time.monotonic()
    try:
        with _environment(_ray_environment(run_dir)):
            import ray

            _log_to(run_dir / "ray.log")
            from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

            # Ray reads both when it is imported, which may have been before; it does the same in ray.init.
            Config.initialize("")
            AuthenticationTokenLoader.instance().reset_cache()
            context = _init_ray(run_dir, dashboard, leave)
        cluster.address = context.address_info["gcs_address"]
        cluster.dashboard_url = context.dashboard_url or None
        cluster.start_s = time.monotonic() - started
    except BaseException as error:  # handed to whoever waits
        cluster._error = error
        return
    finally:
        cluster._is_up.set()
    leave.wait()
    ray.shutdown()


def _init_ray(run_dir: Path, dashboard: bool, leave: threading.Event) -> Any:
    """Call `ray.init`, again where the machine was too busy for Ray's fixed 30 s."""
    import ray

    for _ in range(MAX_STARTS):
        try:
            return ray.init(
                address="local",  # whatever RAY_ADDRESS says
                num_cpus=1,  # workers to start ahead; our actors ask for none, placement is ours
                num_gpus=0,  # Ray must not look for GPUs: trials get theirs by UUID
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=dashboard,
                log_to_driver=False,
                _temp_dir=str(run_dir / "ray"),
            )
        except Exception as error:  # Ray raises nothing narrower
            if "timed out during startup" not in str(error) or leave.is_set():
                raise
            watchdog.sweep(str(run_dir / "ray"), spare=frozenset({os.getpid()}))
    raise UserError(
        f"Ray did not start in {MAX_STARTS} times 30 s: the machine is too busy.",
        remedy="Wait until other programs need less of the CPU, and run the same command again.",
    )


def _log_to(path: Path) -> None:
    """Send what Ray's Python side has to say to a file: the terminal is the user's."""
    logger = logging.getLogger("ray")
    logger.handlers = [logging.FileHandler(path, delay=True)]
    logger.propagate = False


def _ray_environment(run_dir: Path) -> dict[str, str]:
    token_path = run_dir / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(_TOKEN)
    return {
        watchdog.RUN_VARIABLE: str(run_dir),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        # Trials are not Ray's processes: its memory monitor could only kill the small actors beside them.
        "RAY_memory_monitor_refresh_ms": "0",
        # Else Ray copies `uv run`'s environment for every worker.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


@contextlib.contextmanager
def connect(
    address: str, *, imports: Sequence[str] = WARM_IMPORTS, timeout_s: float = 5.0
) -> Iterator[Cluster]:
    """Use a running Ray cluster that this machine is a node of (`HOST:PORT`, or "auto" to find it).

    Raises UserError when nobody answers there, when it is not Ray, or when the token is not the cluster's.
    """
    import ray

    with run_folder() as run_dir:
        _log_to(run_dir / "ray.log")
        if address != "auto":
            _refuse_bad_address(address, timeout_s)
        with _watchdog(run_dir), _environment({watchdog.RUN_VARIABLE: str(run_dir)}):
            starter = WarmServer(run_dir / "warm", imports=imports)
            try:
                yield _connected(address, starter)
            finally:
                ray.shutdown()
                starter.close()
                watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()}))


def _connected(address: str, starter: WarmServer) -> Cluster:
    import ray

    started = time.monotonic()
    try:
        context = ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"the Ray cluster at {address} cannot be used from here: {_first_line(error)}",
            remedy="This machine must be one of its nodes: run `ray start --address=HOST:PORT` first.",
        ) from error
    cluster = Cluster(
        starter=starter,
        address=context.address_info["gcs_address"],
        dashboard_url=context.dashboard_url or None,
        start_s=time.monotonic() - started,
    )
    cluster._is_up.set()
    cluster.wait_until_ready()
    return cluster


def _refuse_bad_address(address: str, timeout_s: float) -> None:
    """Ask the head whether it lives, with our token: `ray.init` would try for 20 s and name no cause."""
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
                    f"the Ray cluster at {address} refuses {'our token' if token else 'us without a token'}.",
                    remedy="Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of that cluster.",
                ) from error
            raise UserError(
                f"what answers at {address} is not the head of a Ray cluster ({error.code().name}).",
                remedy="Use the port that `ray start --head` printed, 6379 by default.",
            ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- the folder of a run, and what dead runs have left -------------------------------------------------


def runs_root() -> Path:
    """Return the folder of all runs of this user; short, as Unix sockets below it have bounded paths."""
    temporary = tempfile.gettempdir()
    return Path(temporary if len(temporary) <= 30 else "/tmp") / f"autosft-{os.getuid()}"


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """Make the folder of this run and hold its lock, which the kernel frees when we die."""
    root = runs_root()
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise UserError(f"{root} belongs to another user.", remedy="Set TMPDIR to a folder of your own.")
    with _locked(root / "lock", wait=True):
        clean_up_dead_runs()
        run_dir = root / secrets.token_hex(4)
        run_dir.mkdir(mode=0o700)
        lock = _lock(run_dir / "lock", wait=False)
    assert lock is not None, "nobody else knows this folder yet"
    try:
        yield run_dir
    finally:
        lock.close()
        shutil.rmtree(run_dir, ignore_errors=True)


def clean_up_dead_runs() -> None:
    """Kill the processes and remove the folders of runs whose driver is dead; leave the others alone."""
    for run_dir in runs_root().iterdir():
        if run_dir.is_dir() and (lock := _lock(run_dir / "lock", wait=False)) is not None:
            with lock:
                watchdog.sweep(str(run_dir), spare=frozenset({os.getpid()}))


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    lock = _lock(path, wait=wait)
    assert lock is not None
    with lock:
        yield


def _lock(path: Path, *, wait: bool) -> IO[Any] | None:
    """Lock a file until it is closed or this process dies; None when another process holds it."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def _watchdog(run_dir: Path) -> Iterator[None]:
    """Have a process stand by that cleans up should this one die; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", watchdog.__file__, str(run_dir), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


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
