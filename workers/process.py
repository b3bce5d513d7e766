"""Trial processes as seen from outside: start one, follow it, stop it, and say why it ended.

`WarmServer` forks attempts from a warm interpreter (Unix); `ColdStarter` spawns one each (anywhere, seconds
slower).  Both are a `Starter`, and `Attempt` follows what they started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, StopReason, TrialEvent, TrialJob
from autosft.studies.wire import from_plain, to_plain
from autosft.workers.attempt import runs_on_cpu

TRAIN_FUNCTION = "autosft.workers.training:train"

# What the warm server imports, or calls, before it serves.
WARM_IMPORTS = ("autosft.workers.warm_up:warm_up()",)

SERVER_ENVIRONMENT = {
    # Large blocks go back to the system at once, so that resident memory follows live tensors: 19-29 MiB
    # over them, repeatable to 1 MiB, against 19-40 % with malloc's defaults (measured on Linux, glibc).
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    # torch.cuda.is_available() asks NVML instead of calling cuInit, which no forked child would survive.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # Threads that wait for each other by spinning halt when something else needs the cores: with two
    # threads on two busy cores a step took 20 times its time.
    "OMP_WAIT_POLICY": "PASSIVE",
}

# After it was asked to stop, an attempt may finish its step and save; a hung one must not hold its device.
STOP_GRACE_S = 60.0


class Channel(Protocol):
    """A started process: its lines, and a way to talk to it."""

    @property
    def lines(self) -> Iterable[bytes]: ...

    @property
    def server_log(self) -> Path | None:
        """Where the server that the process was forked from writes, if there is one."""
        ...

    def send(self, message: dict[str, object]) -> None: ...

    def close(self) -> None:
        """Give the process up: it is killed when it still runs."""
        ...


class Starter(Protocol):
    """Something that starts attempt processes on this machine."""

    def start(self, request: dict[str, object]) -> Channel: ...

    def close(self) -> None: ...


# --- the warm server ----------------------------------------------------------------------------------


class WarmServer:
    """Owns a warm server process and the Unix socket on which it serves.

    The socket takes connections at once; they wait until the imports are done.  A server that has died is
    started again by the next `start` or `ensure`.  It ends with its owner, whatever ends the owner.
    """

    def __init__(self, folder: Path | None = None, *, imports: Sequence[str] = WARM_IMPORTS) -> None:
        """Serve in `folder`, made with mode 0700, or in a temporary one.

        Its path must be short: that of a Unix socket is bounded by about 100 bytes.
        """
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="autosft-", ignore_cleanup_errors=True)
            folder = Path(self._temporary.name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket_path = folder / "warm.sock"
        self.log_path = folder / "warm.log"
        self._imports = tuple(imports)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.ensure()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def ensure(self) -> Path:
        """Start the server unless it runs; return the path of its socket."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._launch()
        return self.socket_path

    def _launch(self) -> None:
        self.socket_path.unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
            self.log_path.open("ab") as log,
        ):
            listener.bind(str(self.socket_path))
            listener.listen(128)
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "autosft.workers.warm_server",
                    "--listener",
                    str(listener.fileno()),
                    *self._imports,
                ],
                stdin=subprocess.PIPE,  # never written: its end tells the server that we are gone
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                env={**os.environ, **SERVER_ENVIRONMENT},
                start_new_session=True,  # the terminal's Ctrl+C is for the user interface, not for trials
            )

    def start(self, request: dict[str, object]) -> Channel:
        return connect(self.ensure(), request)

    def close(self) -> None:
        """End the server and everything that it forked; at most about two seconds."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=1.5)
        except subprocess.TimeoutExpired:  # still importing: it has no children yet
            process.kill()
            process.wait()
        self.socket_path.unlink(missing_ok=True)
        if self._temporary is not None:
            self._temporary.cleanup()


class _SocketChannel:
    def __init__(self, socket_path: Path, *, timeout_s: float | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(socket_path))
        except OSError:
            self._socket.close()
            raise
        self.lines: IO[bytes] = self._socket.makefile("rb")
        self.server_log = socket_path.with_suffix(".log")

    def send(self, message: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # over already; the reader sees the end
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a reader in another thread, which close does not
        self._socket.close()


def connect(socket_path: Path, request: dict[str, object]) -> Channel:
    """Start an attempt on the warm server behind `socket_path`; raises `OSError` when there is none."""
    channel = _SocketChannel(socket_path)
    channel.send(request)
    return channel


def wait_until_gone(socket_path: Path, job: TrialJob, *, timeout_s: float = 10.0) -> bool:
    """Kill what is left of a job's attempt and wait until it is gone; whether that was seen in time.

    For attempts that nobody follows any more.  Raises `OSError` when the server is gone; then so are they.
    """
    channel = _SocketChannel(socket_path, timeout_s=timeout_s)
    channel.send({"wait_until_gone": str(log_path_of(job))})
    pids = [json.loads(line)["gone"] for line in channel.lines if line.strip()]
    channel.close()
    if not runs_on_cpu(job):
        for pid in pids:
            wait_until_off_gpu(pid, job.device_uuids)
    return bool(pids)


# --- without fork -------------------------------------------------------------------------------------


class ColdStarter:
    """Starts each attempt in a new interpreter, for systems without fork."""

    def start(self, request: dict[str, object]) -> Channel:
        return _PipeChannel(request)

    def close(self) -> None:
        pass


class _PipeChannel:
    def __init__(self, request: dict[str, object]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autosft.workers.warm_server", "--once"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **SERVER_ENVIRONMENT},
            start_new_session=True,
        )
        self.lines = self._read()
        self.server_log = None
        self.send(request)

    def _read(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        yield from self._process.stdout
        yield json.dumps({"exit": {"status": self._process.wait(), "oom_killed": False}}).encode()

    def send(self, message: dict[str, object]) -> None:
        assert self._process.stdin is not None
        if "kill" in message:
            self._process.kill()
            return
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def default_starter(folder: Path | None = None) -> Starter:
    """Return a warm server, or a starter of cold processes where they cannot fork."""
    return WarmServer(folder) if hasattr(os, "fork") else ColdStarter()


# --- one attempt --------------------------------------------------------------------------------------


def log_path_of(job: TrialJob) -> Path:
    """Return where the output of an attempt goes."""
    return Path(job.output_dir) / f"attempt-{job.attempt}.log"


class Attempt:
    """One attempt in a process of its own; iterate over `events()` once, call the rest from any thread."""

    def __init__(
        self,
        starter: Starter,
        job: TrialJob,
        *,
        function: str = TRAIN_FUNCTION,
        stop_grace_s: float = STOP_GRACE_S,
    ) -> None:
        """Start the process.  Raises `OSError` when `starter` cannot reach its server."""
        self.job = job
        self.pid: int | None = None
        self._log_path = log_path_of(job)
        self._started = time.monotonic()
        self._stop_grace_s = stop_grace_s
        self._stop_reason: StopReason | None = None
        self._last: Measurement | None = None
        self._killer: threading.Timer | None = None
        self._killed = False
        self._channel = starter.start(
            {"function": function, "job": to_plain(job), "log": str(self._log_path)}
        )

    def events(self) -> Iterator[TrialEvent]:
        """Yield what the attempt reports; its end comes last, once its process and device memory are gone."""
        end: AttemptEnd | None = None
        exit_status: dict[str, Any] | None = None
        try:
            for message in self._messages():
                if "measurement" in message:
                    self._last = from_plain(Measurement, message["measurement"])
                    yield self._last
                elif "end" in message:
                    end = from_plain(AttemptEnd, message["end"])
                elif "pid" in message:
                    self.pid = message["pid"]
                else:
                    exit_status = message["exit"]
        finally:
            if self._killer is not None:
                self._killer.cancel()
            self._channel.close()
        if not runs_on_cpu(self.job) and self.pid is not None:
            wait_until_off_gpu(self.pid, self.job.device_uuids)
        if end is None:
            end = self._end_without_report(exit_status)
        yield replace(end, log_path=str(self._log_path))

    def _messages(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):  # reset, or closed by us
            for line in self._channel.lines:
                with contextlib.suppress(json.JSONDecodeError):  # empty, or cut off by a kill
                    yield json.loads(line)

    def stop(self, reason: StopReason) -> None:
        """Ask the attempt to end after its current step; it is killed when it has not within the grace."""
        if self._stop_reason is None:
            self._stop_reason = reason
            self._killer = threading.Timer(self._stop_grace_s, self.kill)
            self._killer.daemon = True
            self._killer.start()
        self._channel.send({"stop": reason.value})

    def kill(self) -> None:
        """Kill the attempt's process group; the stacks of its threads go to its log first."""
        self._killed = True
        self._channel.send({"kill": True})

    def close(self) -> None:
        """Give the attempt up without waiting for its end."""
        self._channel.close()

    def _end_without_report(self, exit_status: dict[str, Any] | None) -> AttemptEnd:
        failure, message = self._why(exit_status)
        stopped = self._stop_reason if failure is None else None
        duration_s = time.monotonic() - self._started
        return end_of(self.job, failure, message, stopped=stopped, last=self._last, duration_s=duration_s)

    def _why(self, exit_status: dict[str, Any] | None) -> tuple[FailureKind | None, str]:
        """Say why a process ended that reported no end of its own."""
        if exit_status is None:
            server_log = self._channel.server_log
            said = " | ".join(output_before_crash(server_log)[-2:]) if server_log else ""
            return FailureKind.WORKER_LOST, f"the warm server is gone; its last words: {said or '(none)'}"
        status = exit_status["status"]
        if exit_status["oom_killed"]:
            return FailureKind.HOST_OUT_OF_MEMORY, "killed by the kernel because the host was out of memory"
        if self._killed and self._stop_reason is not None and status < 0:
            reason = self._stop_reason.value
            return None, f"{reason}; killed, as it had not stopped in {self._stop_grace_s:g} s"
        output = output_before_crash(self._log_path)
        last_words = " | ".join(output[-3:]) or "(none)"
        if status >= 0:
            return FailureKind.ERROR, f"exit code {status} without a result; its last words: {last_words}"
        name = signal.Signals(-status).name
        if -status not in (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE):
            return FailureKind.WORKER_LOST, f"killed by {name}"
        for line in output:
            if "memory allocation of" in line or "bad_alloc" in line:  # Rust and C++ abort without memory
                on_cpu = runs_on_cpu(self.job)
                return FailureKind.OUT_OF_MEMORY if on_cpu else FailureKind.HOST_OUT_OF_MEMORY, line
        return FailureKind.ERROR, f"crashed with {name}; its last words: {last_words}"


def end_of(
    job: TrialJob,
    failure: FailureKind | None,
    message: str,
    *,
    stopped: StopReason | None = None,
    last: Measurement | None = None,
    duration_s: float = 0.0,
) -> AttemptEnd:
    """Return the end of an attempt that could not report one itself."""
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=False,
        stopped=stopped,
        failure=failure,
        message=message,
        log_path=str(log_path_of(job)),
        peak_allocated_bytes=last.peak_allocated_bytes if last else None,
        peak_reserved_bytes=last.peak_reserved_bytes if last else None,
        duration_s=duration_s,
        eval_fingerprint=None,
    )


def output_before_crash(path: Path, *, max_bytes: int = 32768) -> list[str]:
    """Return the last lines of a log, without the stacks that faulthandler writes after a crash."""
    try:
        with path.open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - max_bytes, 0))
            text = log.read().decode(errors="replace")
    except OSError:
        return []
    words, _, _ = text.partition("Fatal Python error:")
    return [line.strip() for line in words.splitlines() if line.strip()]


def wait_until_off_gpu(pid: int, device_uuids: Sequence[str], *, timeout_s: float = 10.0) -> bool:
    """Wait until NVML no longer lists a process on any of the devices; whether that was seen in time.

    NVML lags process exit by up to a second; a slot freed earlier makes the next trial run out of memory.
    A container with its own process ids is not told the pids, and then there is nothing to wait for.
    """
    import pynvml

    deadline = time.monotonic() + timeout_s
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    try:
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in device_uuids]
        while any(p.pid == pid for h in handles for p in pynvml.nvmlDeviceGetComputeRunningProcesses(h)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    except pynvml.NVMLError:
        return False
    finally:
        pynvml.nvmlShutdown()
    return True
