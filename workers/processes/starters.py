"""Start the processes that attempts run in.

`WarmServer` forks them from a warm interpreter (Unix); `ColdStarter` spawns an interpreter for each
(anywhere, seconds slower).  Both implement `Starter`; `attempt_monitor.Attempt` monitors what they start.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from autosft.profiles.child_python import python
from autosft.profiles.short_folder import short_base
from autosft.studies.trial import TrialJob
from autosft.studies.wire import to_plain

# Modules the warm server imports, or functions it calls, before it serves.
WARM_IMPORTS = ("autosft.workers.processes.warm_up:warm_up()",)

SERVER_ENVIRONMENT = {
    # Large blocks go back to the system at once, so that resident memory follows live tensors: 19-29 MiB
    # over them, repeatable to 1 MiB, against 19-40 % with malloc's defaults (measured on Linux, glibc).
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    # Aligned blocks, as torch's are, leave splinters that malloc's caches keep from merging: its heap cannot
    # take longer tensors where shorter ones were.  A LoRA trial of a 640 wide model (tensors of 430 MiB) took
    # 556 MiB with the caches and 503 without; its steps were no slower.
    # Huge pages, where the system lets programs choose: clears 512 small pages at a time of large blocks,
    # which are allocated anew every time.  A vocabulary of 16,000: 36 -> 26 s; lengths of 768: 21.7 -> 18.9
    # s; the peak was the same to 4 MiB (two runs each, one core).
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1",
    # torch.cuda.is_available() asks NVML instead of calling cuInit, after which forked children cannot use
    # CUDA.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # Threads that wait by spinning starve each other when something else needs the cores: with two threads on
    # two busy cores a step took 20 times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def server_environment() -> dict[str, str]:
    """Return this process's environment with the settings for attempts; the user's take precedence."""
    values = {**os.environ, **SERVER_ENVIRONMENT}
    if own := os.environ.get("GLIBC_TUNABLES"):
        values["GLIBC_TUNABLES"] = f"{own}:{SERVER_ENVIRONMENT['GLIBC_TUNABLES']}"
    return values


class Channel(Protocol):
    """A started process: its output lines, and a way to send it messages."""

    @property
    def lines(self) -> Iterable[bytes]: ...

    @property
    def server_log(self) -> Path | None:
        """The log of the server that the process was forked from, None without a server."""
        ...

    def send(self, message: dict[str, object]) -> None: ...

    def close(self) -> None:
        """Abandon the process; it is killed if it is still running."""
        ...


class Starter(Protocol):
    """Starts attempt processes on this machine."""

    def start(self, request: dict[str, object]) -> Channel: ...

    def close(self) -> None: ...


# --- the warm server ----------------------------------------------------------------------------------


class WarmServer:
    """Owns a warm server process and the Unix socket it serves on.

    The socket accepts connections at once; they wait until the imports are done.  The next `start` or
    `ensure` restarts a server that has died.  The server ends with its owner, however the owner ends.
    """

    def __init__(self, folder: Path | None = None, *, imports: Sequence[str] = WARM_IMPORTS) -> None:
        """Serve in `folder`, made with mode 0700, or in a temporary one.

        Its path must be short (see `short_folder`).
        """
        self._temporary = None
        if folder is None:
            base = short_base(room_bytes=len("/autosft-abcdefgh/warm.sock"))
            self._temporary = tempfile.TemporaryDirectory(
                prefix="autosft-", dir=base, ignore_cleanup_errors=True
            )
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
        """Start the server unless it is running; return its socket path."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                self._process = None
            if self._process is None:
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
                python(
                    "-m",
                    "autosft.workers.processes.warm_server",
                    "--listener",
                    str(listener.fileno()),
                    *(["--remove", self._temporary.name] if self._temporary else []),
                    *self._imports,
                ),
                stdin=subprocess.PIPE,  # never written to: end of file means that the owner is gone
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                env=server_environment(),
                start_new_session=True,  # Ctrl+C in the terminal is for the user interface, not for trials
            )

    def start(self, request: dict[str, object]) -> Channel:
        return connect(self.ensure(), request)

    def close(self) -> None:
        """End the server and everything it forked; takes two seconds at most."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:  # else its last start has failed
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=1.5)
            except subprocess.TimeoutExpired:  # still importing, so it has no children
                process.kill()
                process.wait()
        with contextlib.suppress(OSError):  # its disk is read-only now
            self.socket_path.unlink(missing_ok=True)
        if self._temporary is not None:
            self._temporary.cleanup()  # the server has done so, unless it was killed


class SocketChannel:
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
        with contextlib.suppress(OSError):  # it has ended; the reader sees that
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def is_silent(self) -> bool:
        """Whether nothing has arrived since the last line was read, end of file included."""
        readable, _, _ = select.select([self._socket], [], [], 0.0)
        return not readable

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a reader in another thread, which close does not
        self._socket.close()


def connect(socket_path: Path, request: dict[str, object]) -> Channel:
    """Start an attempt on the warm server at `socket_path`; raises `OSError` if there is none."""
    channel = SocketChannel(socket_path)
    channel.send(request)
    return channel


class Connector:
    """A `Starter` for a warm server owned by another process, and for a process of it that has preloaded."""

    def __init__(self, socket_path: Path, prepared: SocketChannel | None = None) -> None:
        self._socket_path = socket_path
        self._prepared = prepared

    def start(self, request: dict[str, object]) -> Channel:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.is_silent():
            prepared.send(request)
            return prepared
        if prepared is not None:  # it has died
            prepared.close()
        return connect(self._socket_path, request)

    def close(self) -> None:
        pass


def prepare(socket_path: Path, function: str, job: TrialJob) -> SocketChannel:
    """Have a process preload, with `function` ("module:name"), what attempts like `job` need.

    The request for such an attempt, of one rank, may be sent to it at any time while `is_silent`.  Closing
    the channel ends the process.  Raises `OSError` if there is no server.
    """
    channel = SocketChannel(socket_path)
    channel.send({"prepare": function, "job": to_plain(job), "log": ""})
    return channel


def call(
    starter: Starter, function: str, arguments: Mapping[str, object], *, num_threads: int, log: Path
) -> Any:
    """Call `function` ("module:name") with JSON arguments in a process of its own; return its JSON result.

    For work with tensors outside attempts: the caller's process stays free of them, and a fork of the warm
    server starts in milliseconds.  Raises ChildProcessError if the function raises or its process dies; its
    output is in `log`.
    """
    channel = starter.start(
        {"call": function, "arguments": dict(arguments), "num_threads": num_threads, "log": str(log)}
    )
    try:
        messages = [json.loads(line) for line in channel.lines if line.strip()]
    finally:
        channel.close()
    for message in messages:
        if "result" in message:
            return message["result"]
        if "error" in message:
            raise ChildProcessError(f"{message['error'].rstrip('.')}. The log is {log}.")
    raise ChildProcessError(f"{function} ended without a result. The log is {log}.")


# --- without fork -------------------------------------------------------------------------------------


class ColdStarter:
    """Starts each attempt in a new interpreter; for systems without fork."""

    def start(self, request: dict[str, object]) -> Channel:
        return _PipeChannel(request)

    def close(self) -> None:
        pass


class _PipeChannel:
    """The processes of an attempt's ranks on this machine, behind one channel."""

    def __init__(self, request: dict[str, object]) -> None:
        ranks = request.get("ranks", [0])
        assert isinstance(ranks, list)
        self._processes: dict[int, subprocess.Popen[bytes]] = {rank: _spawn() for rank in ranks}
        self._lines: queue.SimpleQueue[tuple[int, bytes | None]] = queue.SimpleQueue()
        self._was_killed = False
        self.lines = self._read()
        self.server_log = None
        for rank, process in self._processes.items():
            self._write(process, {**request, "rank": rank})
            threading.Thread(target=self._read_one, args=(rank, process), daemon=True).start()

    def _read_one(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # closed by us
            for line in process.stdout:
                self._lines.put((rank, line))
        self._lines.put((rank, None))

    def _read(self) -> Iterator[bytes]:
        exits: list[dict[str, object]] = []
        num_left = len(self._processes)
        while num_left:
            rank, line = self._lines.get()
            if line is not None:
                yield line
                continue
            num_left -= 1
            status = self._processes[rank].wait()
            if not (self._was_killed and exits):
                exits.append({"rank": rank, "status": status, "oom_killed": False})
            if status != 0:  # the other ranks would wait for it forever
                self.send({"kill": True})
        yield json.dumps({"exits": exits}).encode()

    def send(self, message: dict[str, object]) -> None:
        if "kill" in message:
            self._was_killed = True
        for process in self._processes.values():
            if "kill" in message:
                process.kill()
            else:
                self._write(process, message)

    def _write(self, process: subprocess.Popen[bytes], message: dict[str, object]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # over already
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()


def _spawn() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        python("-m", "autosft.workers.processes.warm_server", "--once"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=server_environment(),
        start_new_session=True,
    )


def default_starter(folder: Path | None = None) -> Starter:
    """Return a warm server, or a `ColdStarter` where there is no fork."""
    return WarmServer(folder) if hasattr(os, "fork") else ColdStarter()
