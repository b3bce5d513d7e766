"""The warm server: one interpreter a node that has imported the training stack and forks a child per attempt.

Run as `python -m autosft.workers.warm_server --listener FD IMPORT...` by `process.WarmServer`.  The server
computes nothing: after one OpenMP operation before a fork the child would hang, and a CUDA context does not
survive a fork at all.  It ends when its standard input does, which the kernel closes when its owner dies.

One connection is one attempt, in lines of JSON:
    client -> server   {"function", "job", "log"}, then {"stop": reason} and {"kill": true} in any number
    child  -> client   {"pid": n}, {"measurement": ...} in any number, {"end": ...}
    server -> client   {"exit": {"status", "oom_killed"}}, once the child and all that it started are gone
or one call of a function, answered in place of measurements and an end:
    client -> server   {"call", "arguments", "num_threads", "log"}
    child  -> client   {"result": ...} or {"error": words}
or one question about another one, which is killed if it still runs:
    client -> server   {"wait_until_gone": log}
    server -> client   {"gone": pid}, with 0 for an attempt that is not there
A connection that the client closes kills its attempt.  Where there is no fork, `--once` serves a single
attempt over standard input and output with the same lines but the last, which the client sees for itself.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autosft.workers.attempt import resolve, run_once, run_request

# prctl(2); Linux only.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve forked training processes (used by autosft itself).")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--listener", type=int, help="file descriptor of a listening socket")
    how.add_argument("--once", action="store_true", help="run one attempt over standard input and output")
    parser.add_argument("--remove", help="folder to remove at the end, in case the owner is killed")
    parser.add_argument("imports", nargs="*", help="module, or module:function() to call, before serving")
    options = parser.parse_args(arguments)
    if options.once:
        run_once()
    started = time.perf_counter()
    for name in options.imports:
        resolve(name)
    assert_forkable()
    gc.collect()
    gc.freeze()  # else the first collection in each child copies the whole heap: 200 ms and 100 MB
    print(f"warm after {time.perf_counter() - started:.2f} s, pid {os.getpid()}", flush=True)  # noqa: T201
    _Server(socket.socket(fileno=options.listener)).serve()
    if options.remove:
        shutil.rmtree(options.remove, ignore_errors=True)
    return 0


def assert_forkable() -> None:
    """Assert that no import has opened CUDA or left a Python thread: children would hang or fail."""
    torch = sys.modules.get("torch")
    assert torch is None or not torch.cuda.is_initialized(), "an import initialised CUDA before the fork"
    assert threading.active_count() == 1, f"an import left threads running: {threading.enumerate()}"
    with contextlib.suppress(FileNotFoundError):  # no /proc
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                # cuInit opens nvidia-uvm; NVML, which may be used before a fork, does not.
                assert not str(link.readlink()).startswith("/dev/nvidia-uvm"), "an import called cuInit"


class _Connection:
    """One client and, once its request is complete, one child."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.received = b""
        self.pid: int | None = None
        self.log = ""  # names the attempt
        self.waiting: list[_Connection] = []  # want to know when the child is gone
        self.stop_writer = -1
        self.oom_kills_before = 0
        self.kill_at: float | None = None


class _Server:
    """A single-threaded loop over the listener, the connections, dying children and its own life line."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.connections: set[_Connection] = set()
        self.selector = selectors.DefaultSelector()
        self.wakeup_reader, self.wakeup_writer = socket.socketpair()

    def serve(self) -> None:
        """Serve until standard input ends; kill what is left then."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a child come to us and can be killed
        self.wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self.wakeup_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.selector.register(self.wakeup_reader, selectors.EVENT_READ, self._reap)
        self.selector.register(0, selectors.EVENT_READ, None)
        while True:
            for key, _ in self.selector.select(self._until_next_kill()):
                if key.fd == 0:
                    if not os.read(0, 4096):
                        return self._kill_all()
                elif isinstance(key.data, _Connection):
                    self._receive(key.data)
                else:
                    key.data()
            for connection in self.connections:
                if connection.kill_at is not None and connection.kill_at <= time.monotonic():
                    connection.kill_at = None
                    _kill_group(connection.pid)

    def _until_next_kill(self) -> float | None:
        times = [c.kill_at for c in self.connections if c.kill_at is not None]
        return max(min(times) - time.monotonic(), 0.0) if times else None

    def _accept(self) -> None:
        channel, _ = self.listener.accept()
        connection = _Connection(channel)
        self.connections.add(connection)
        self.selector.register(channel, selectors.EVENT_READ, connection)

    def _receive(self, connection: _Connection) -> None:
        # Never O_NONBLOCK: the flag would be shared with the child, which writes to the same socket.
        try:
            data = connection.channel.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._client_left(connection)
            return
        *lines, connection.received = (connection.received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "function" in message or "call" in message:
                self._fork(connection, message)
            elif "wait_until_gone" in message:
                self._kill_for(connection, message["wait_until_gone"])
            elif "stop" in message:
                with contextlib.suppress(OSError):  # the child is over already
                    os.write(connection.stop_writer, line + b"\n")
            elif "kill" in message and connection.pid is not None:
                # faulthandler writes every thread's stack to the log first: a killed hang can be explained.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(connection.pid, signal.SIGUSR1)
                connection.kill_at = time.monotonic() + 0.2

    def _client_left(self, connection: _Connection) -> None:
        self.selector.unregister(connection.channel)
        if connection.pid is None:
            self._forget(connection)
        else:
            _kill_group(connection.pid)  # _reap forgets it

    def _fork(self, connection: _Connection, request: dict[str, Any]) -> None:
        assert connection.pid is None, "one connection serves one attempt"
        stop_reader, connection.stop_writer = os.pipe()
        connection.oom_kills_before = num_oom_kills()
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._leave_server(connection)
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != server_pid:  # it died before prctl could tell
                    os._exit(1)
                run_request(request, connection.channel.sendall, os.fdopen(stop_reader, "rb"))
            except BaseException:  # a bug of ours or a client that has left; the server's log has it
                traceback.print_exc()
            finally:
                os._exit(70)
        os.close(stop_reader)
        connection.pid = pid
        connection.log = request["log"]

    def _kill_for(self, waiting: _Connection, log: str) -> None:
        """Kill the attempt that writes `log`, and answer once it is gone."""
        for connection in self.connections:
            if connection.pid is not None and connection.log == log:
                _kill_group(connection.pid)
                connection.waiting.append(waiting)
                return
        _send(waiting, {"gone": 0})
        self._forget(waiting)

    def _leave_server(self, own: _Connection) -> None:
        """In the child: drop every handle of the server, so that other clients see their ends."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        self.listener.close()
        self.wakeup_reader.close()
        self.wakeup_writer.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for connection in self.connections:
            if connection.stop_writer >= 0:
                os.close(connection.stop_writer)
            if connection is not own:
                connection.channel.close()

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.wakeup_reader.recv(4096, socket.MSG_DONTWAIT)
        by_pid = {c.pid: c for c in self.connections if c.pid is not None}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                connection = by_pid.get(pid)
                if connection is not None:
                    _kill_members(pid)
                    _kill_orphans(keep={c.pid for c in self.connections} - {pid})
                    self._tell_exit(connection, status)
                    self._forget(connection)

    def _tell_exit(self, connection: _Connection, status: int) -> None:
        oom_killed = (
            os.WIFSIGNALED(status)
            and os.WTERMSIG(status) == signal.SIGKILL
            and num_oom_kills() > connection.oom_kills_before
        )
        exit_code = os.waitstatus_to_exitcode(status)
        _send(connection, {"exit": {"status": exit_code, "oom_killed": oom_killed}})
        for waiting in connection.waiting:
            _send(waiting, {"gone": connection.pid})
            self._forget(waiting)

    def _forget(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(connection.channel)
        connection.channel.close()
        if connection.stop_writer >= 0:
            os.close(connection.stop_writer)

    def _kill_all(self) -> None:
        for connection in self.connections:
            _kill_group(connection.pid)
        _kill_orphans(keep=set())


def _send(connection: _Connection, message: dict[str, object]) -> None:
    """Send a line without ever waiting for the client, which may be stuck or gone."""
    line = json.dumps(message)
    with contextlib.suppress(OSError):
        # The newline first ends a line that the child was killed in.
        connection.channel.send(f"\n{line}\n".encode(), socket.MSG_DONTWAIT)


def num_oom_kills() -> int:
    """Return how often the kernel's OOM killer struck where this process lives (Linux; else 0).

    From the control group's own counter where it can be read (version 2, then 1), else the machine's.
    """
    sources = []
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/cgroup").read_text().splitlines():
            hierarchy, controllers, path = entry.split(":", 2)
            if hierarchy == "0":
                sources.append(f"/sys/fs/cgroup{path}/memory.events")
            elif "memory" in controllers.split(","):
                sources.append(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
    for source in (*sources, "/proc/vmstat"):
        with contextlib.suppress(OSError):
            for line in Path(source).read_text().splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill":
                    return int(count)
    return 0


def _kill_group(pid: int | None) -> None:
    """Kill a child that has not been waited for, and its group."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)  # it may not have its own group yet
        _kill_members(pid)


def _kill_members(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _kill_orphans(keep: set[int | None]) -> None:
    """Kill what dead children left behind, and wait for it: as their subreaper we became its parent."""
    import psutil

    victims = []
    for child in psutil.Process().children():
        if child.pid not in keep:
            with contextlib.suppress(psutil.Error):
                victims += [child, *child.children(recursive=True)]
    for victim in victims:
        with contextlib.suppress(psutil.Error):
            victim.kill()
    psutil.wait_procs(victims, timeout=1.0)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _prctl(option: int, argument: int) -> None:
    if _LIBC is not None:
        _LIBC.prctl(option, argument, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
