"""The warm server: one interpreter per node, with the training stack imported, that forks attempts.

`starters.WarmServer` runs `python -m autosft.workers.processes.warm_server --listener FD IMPORT...`.  The
server computes nothing: after a single OpenMP operation before a fork the child would hang, and a CUDA
context does not survive a fork.  It ends at end of file on its standard input, which the kernel closes when
its owner dies.

A connection carries JSON lines.  It is one attempt, with a child for each of its ranks on this node:
    client -> server   {"function", "job", "log", "ranks"}, then {"stop": reason} and {"kill": true}
    child  -> client   {"rank", "pid"}, {"rank", "measurement"} and {"rank", "alive"} in any number,
                       {"rank", "end"}
    server -> client   {"exits": [{"rank", "status", "oom_killed"}, ...]}, once the children and all that
                       they started are gone; without those that the server killed for another's sake
or a process that preloads what such a job needs, and then waits for the attempt's request:
    client -> server   {"prepare", "job", "log"}, and later {"function", ...} as above
or one function call, answered by its result:
    client -> server   {"call", "arguments", "num_threads", "log"}
    child  -> client   {"result": ...} or {"error": message}
or a query about another attempt, which is killed if it is still running:
    client -> server   {"wait_until_gone": log}
    server -> client   {"gone": [pid, ...]}, empty if there is no such attempt
When the client closes the connection, its attempt is killed; when a child fails, so are its siblings.  Where
there is no fork, `--once` serves a single rank over standard input and output with the same lines but the
last, which the client sees for itself.

SIGTERM, which a node receives before it is shut down, is passed on: every attempt saves and ends as after
{"stop": "shutdown"}, and the server ends with the last of them.
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

from autosft.studies.trial import StopReason
from autosft.workers.processes.attempt_process import resolve, run_once, run_request

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
    has_owner = _Server(socket.socket(fileno=options.listener)).serve()
    if options.remove and not has_owner:
        shutil.rmtree(options.remove, ignore_errors=True)
    return 0


def assert_forkable() -> None:
    """Assert that no import initialised CUDA or left a thread running: children would hang or fail."""
    torch = sys.modules.get("torch")
    assert torch is None or not torch.cuda.is_initialized(), "an import initialised CUDA before the fork"
    assert threading.active_count() == 1, f"an import left threads running: {threading.enumerate()}"
    with contextlib.suppress(FileNotFoundError):  # no /proc
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                # cuInit opens nvidia-uvm; NVML, which may be used before a fork, does not.
                assert not str(link.readlink()).startswith("/dev/nvidia-uvm"), "an import called cuInit"


class _Connection:
    """A client and, once its request has arrived, the children that serve it."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.received = b""
        self.children: dict[int, int] = {}  # rank by pid, of those that live
        self.pids: list[int] = []  # of all children, past ones included
        self.exits: list[dict[str, object]] = []
        self.log = ""  # names the attempt
        self.waiting: list[_Connection] = []  # clients to notify when the children are gone
        self.stop_writers: list[int] = []
        self.oom_kills_before = 0
        self.kill_at: float | None = None
        self.was_killed = False

    def stop(self, reason: StopReason) -> None:
        """Ask the children to end."""
        for writer in self.stop_writers:
            with contextlib.suppress(OSError):  # it has ended
                os.write(writer, json.dumps({"stop": reason.value}).encode() + b"\n")

    def kill(self) -> None:
        """Kill the children that have not been reaped, and their process groups."""
        self.was_killed = True
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)  # it may not lead a group yet
            _kill_members(pid)


class _Server:
    """A single-threaded loop over the listener, connections, dying children, and standard input."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.connections: set[_Connection] = set()
        self.selector = selectors.DefaultSelector()
        self.wakeup_reader, self.wakeup_writer = socket.socketpair()
        self.is_leaving = False

    def serve(self) -> bool:
        """Serve until the owner is gone, then kill the rest; after SIGTERM, until all attempts have ended.

        Returns whether the owner is still there.
        """
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # a child's orphans are reparented to us and can be killed
        self.wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self.wakeup_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.selector.register(self.wakeup_reader, selectors.EVENT_READ, self._wake_up)
        self.selector.register(0, selectors.EVENT_READ, None)
        while not (self.is_leaving and not any(c.children for c in self.connections)):
            for key, _ in self.selector.select(self._until_next_kill()):
                if key.fd == 0:
                    if not os.read(0, 4096):
                        self._kill_all()
                        return False
                elif isinstance(key.data, _Connection):
                    self._receive(key.data)
                else:
                    key.data()
            for connection in self.connections:
                if connection.kill_at is not None and connection.kill_at <= time.monotonic():
                    connection.kill_at = None
                    connection.kill()
        return True

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
            if connection.pids and "function" in message:
                self._hand_over(connection, message)
            elif {"function", "call", "prepare"} & message.keys():
                self._start(connection, message)
            elif "wait_until_gone" in message:
                self._kill_for(connection, message["wait_until_gone"])
            elif "stop" in message:
                connection.stop(StopReason(message["stop"]))
            elif "kill" in message:
                # faulthandler writes every thread's stack to the log first: a killed hang can be explained.
                for pid in connection.children:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGUSR1)
                connection.kill_at = time.monotonic() + 0.2

    def _client_left(self, connection: _Connection) -> None:
        self.selector.unregister(connection.channel)
        if connection.children:
            connection.kill()  # _reap forgets it
        else:
            self._forget(connection)

    def _start(self, connection: _Connection, request: dict[str, Any]) -> None:
        assert not connection.pids, "one connection serves one attempt"
        if self.is_leaving:
            self._forget(connection)
            return
        connection.log = request["log"]
        connection.oom_kills_before = num_oom_kills()
        for rank in request.get("ranks", [0]):
            try:
                self._fork(connection, {**request, "rank": rank})
            except OSError as error:  # no further process, file or memory is allowed here
                _send(connection, {"refused": error.strerror})
                connection.kill()
                if not connection.children:
                    self._forget(connection)
                return

    def _hand_over(self, connection: _Connection, request: dict[str, Any]) -> None:
        """Pass an attempt's request to the process that has preloaded for it."""
        connection.log = request["log"]
        connection.oom_kills_before = num_oom_kills()
        for writer in connection.stop_writers:
            with contextlib.suppress(OSError):  # it has died: its exit is about to be reported
                os.write(writer, json.dumps({**request, "rank": 0}).encode() + b"\n")

    def _fork(self, connection: _Connection, request: dict[str, Any]) -> None:
        stop_reader, stop_writer = os.pipe()
        connection.stop_writers.append(stop_writer)
        server_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            os.close(stop_reader)
            raise
        if pid == 0:
            try:
                self._leave_server(connection)
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != server_pid:  # the server died before prctl took effect
                    os._exit(1)
                run_request(request, connection.channel.sendall, os.fdopen(stop_reader, "rb"))
            except BaseException:  # a bug, or the client has left; goes to the server's log
                traceback.print_exc()
            finally:
                os._exit(70)
        os.close(stop_reader)
        connection.children[pid] = request["rank"]
        connection.pids.append(pid)

    def _kill_for(self, waiting: _Connection, log: str) -> None:
        """Kill the attempt that writes to `log`, and notify the client once it is gone."""
        for connection in self.connections:
            if connection.children and connection.log == log:
                connection.kill()
                connection.waiting.append(waiting)
                return
        _send(waiting, {"gone": []})
        self._forget(waiting)

    def _leave_server(self, own: _Connection) -> None:
        """In the child: close the server's descriptors, so that other clients see their connections end."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.selector.close()
        self.listener.close()
        self.wakeup_reader.close()
        self.wakeup_writer.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for connection in self.connections:
            for stop_writer in connection.stop_writers:
                os.close(stop_writer)
            if connection is not own:
                connection.channel.close()

    def _wake_up(self) -> None:
        """Handle the signals that have arrived."""
        numbers = b""
        with contextlib.suppress(BlockingIOError):
            numbers = self.wakeup_reader.recv(4096, socket.MSG_DONTWAIT)
        if signal.SIGTERM in numbers:
            self.is_leaving = True
            for connection in self.connections:
                connection.stop(StopReason.SHUTDOWN)
        self._reap()

    def _reap(self) -> None:
        by_pid = {pid: c for c in self.connections for pid in c.children}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if (connection := by_pid.get(pid)) is not None:
                    self._child_ended(connection, pid, status)

    def _child_ended(self, connection: _Connection, pid: int, status: int) -> None:
        rank = connection.children.pop(pid)
        _kill_members(pid)
        _kill_orphans(keep={pid for c in self.connections for pid in c.children})
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        was_killed_for_another = killed and connection.was_killed and connection.exits
        if not was_killed_for_another:
            oom_killed = killed and num_oom_kills() > connection.oom_kills_before
            exit_code = os.waitstatus_to_exitcode(status)
            connection.exits.append({"rank": rank, "status": exit_code, "oom_killed": oom_killed})
        if not connection.children:
            self._tell_exits(connection)
            self._forget(connection)
        elif status != 0:
            connection.kill()

    def _tell_exits(self, connection: _Connection) -> None:
        _send(connection, {"exits": connection.exits})
        for waiting in connection.waiting:
            _send(waiting, {"gone": connection.pids})
            self._forget(waiting)

    def _forget(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(connection.channel)
        connection.channel.close()
        while connection.stop_writers:
            os.close(connection.stop_writers.pop())

    def _kill_all(self) -> None:
        for connection in self.connections:
            connection.kill()
        _kill_orphans(keep=set())


def _send(connection: _Connection, message: dict[str, object]) -> None:
    """Send a line without blocking: the client may be stuck or gone."""
    line = json.dumps(message)
    with contextlib.suppress(OSError):
        # The leading newline ends a line that a killed child left unfinished.
        connection.channel.send(f"\n{line}\n".encode(), socket.MSG_DONTWAIT)


def num_oom_kills() -> int:
    """Return the number of kills by the kernel's OOM killer in this control group (Linux; elsewhere 0).

    Read from the control group's counter (version 2, then 1), or else the machine's.
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


def _kill_members(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _kill_orphans(keep: set[int]) -> None:
    """Kill and reap what dead children left behind: as their subreaper we have become its parent."""
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
