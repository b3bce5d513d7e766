"""Run the process of one attempt, from the fork to its exit.

The training function is given by name, so that this module imports nothing heavy and tests can run a cheap
one. It is called as `train(job, report, stop_requested)` and returns an `AttemptEnd`; exceptions are
classified (`failures`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from autosft.profiles.memory.host_kernels import UNTOUCHED_BYTES
from autosft.studies.trial import AttemptEnd, Measurement, StopReason, TrialJob
from autosft.studies.wire import from_plain, to_plain
from autosft.workers.device import device_of, pads_to_few_sizes
from autosft.workers.processes.failures import failed
from autosft.workers.processes.logs import redirect_output
from autosft.workers.processes.memory_limit import (
    data_segment_bytes,
    lift_data_limit,
    limit_data_segment,
)
from autosft.workers.ranks import Seat, seat_environment

#: How often an attempt without reports sends a sign of progress.
ALIVE_EVERY_S = 1.0

TrainFunction = Callable[
    [TrialJob, Callable[[Measurement], None], Callable[[], StopReason | None]],
    AttemptEnd,
]


def resolve(name: str) -> Any:
    """Import `module` or `module:attribute` and return it, or what `module:function()` returns."""
    module_name, _, attribute = name.removesuffix("()").partition(":")
    module = importlib.import_module(module_name)
    found: Any = getattr(module, attribute) if attribute else module
    return found() if name.endswith("()") else found


def run_request(request: Mapping[str, Any], send: Callable[[bytes], object], commands: BinaryIO) -> NoReturn:
    """Serve a client's request, an attempt or a call, in this process, and exit."""
    if "call" in request:
        run_call(request, send, commands)
    if "prepare" in request:
        run_prepared(request, send, commands)
    run_attempt(request, send, commands)


def run_prepared(request: Mapping[str, Any], send: Callable[[bytes], object], commands: BinaryIO) -> NoReturn:
    """Preload for an attempt like the job in `request`, wait for the attempt's request, and run it.

    Sends nothing before that.  Errors in preloading are ignored: the attempt loads what is missing.
    """
    become_leader()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inherited_bytes = data_segment_bytes()
    try:
        set_num_threads(1)
        resolve(request["prepare"])(from_plain(TrialJob, request["job"]))
    except BaseException:
        traceback.print_exc()
    line = commands.readline()
    message = json.loads(line) if line else {}
    if "function" not in message:  # asked to stop, or the client is gone
        os._exit(0)
    run_attempt(message, send, commands, inherited_bytes=inherited_bytes)


def run_call(request: Mapping[str, Any], send: Callable[[bytes], object], commands: BinaryIO) -> NoReturn:
    """Call a function by name with JSON arguments, and send its result, which must be JSON too.

    For work with tensors outside attempts, such as generating answers: see `starters.call`.
    """
    become_leader()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_listen, args=(commands, []), daemon=True).start()
    try:
        redirect_output(Path(request["log"]))
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        set_num_threads(request["num_threads"])
        message = {"result": resolve(request["call"])(**request["arguments"])}
    except BaseException as error:
        traceback.print_exc()
        message = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    leave(send, message)


def become_leader() -> None:
    """Become the leader of a process group, so that the group can be killed as a whole.

    Where the machine or the container runs out of memory, the kernel kills what takes most of it: this one
    rather than the driver, which would end the study.
    """
    with contextlib.suppress(AttributeError, OSError):  # Windows; already a session leader
        os.setsid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def run_once() -> NoReturn:
    """Run the attempt whose request is the first line of standard input (where fork is missing)."""
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    run_request(json.loads(sys.stdin.buffer.readline()), events.write, sys.stdin.buffer)


def run_attempt(
    request: Mapping[str, Any],
    send: Callable[[bytes], object],
    commands: BinaryIO,
    *,
    inherited_bytes: int | None = None,
) -> NoReturn:
    """Run a rank of an attempt in this process, which belongs to it from here on, and exit.

    `send` takes lines for the client; `commands` yields {"stop": reason} lines and ends when the client is
    gone.  Of several ranks only the first reports, and any that fails; the exit code is 1 after an exception,
    so that the other ranks do not wait for it, else 0.  `inherited_bytes`: the data segment before anything
    of the attempt was loaded, if that was earlier.
    """
    stop = _follow_commands(commands)
    seat = Seat(rank=request["rank"], ranks_here=tuple(request["ranks"]))
    reporter = _Reporter(send, seat, stop)
    reporter.tell({"pid": os.getpid()})
    job = from_plain(TrialJob, request["job"])
    log_path = Path(request["log"])
    has_failed = False
    try:
        redirect_output(log_path)
        set_environment(environment_of(job, seat))
        set_num_threads(job.plan.num_threads)
        train: TrainFunction = resolve(request["function"])
        if device_of(job).uses_host_memory:
            limit_data_segment(
                job.plan.memory_cap_bytes,
                num_threads=job.plan.num_threads,
                inherited_bytes=data_segment_bytes() if inherited_bytes is None else inherited_bytes,
                kernel_bytes=UNTOUCHED_BYTES if pads_to_few_sizes(job) else 0,
            )
        end = train(job, reporter.report, reporter.stop_requested)
    except BaseException as error:  # any exception ends the attempt and is reported
        lift_data_limit()  # reporting the failure takes memory too
        traceback.print_exc()
        end = failed(job, error, log_path, time.monotonic() - reporter.started, reporter.last)
        has_failed = True
    message = {"rank": seat.rank, "end": to_plain(end)} if seat.rank == 0 or has_failed else None
    leave(send, message, exit_code=int(has_failed))


def _follow_commands(commands: BinaryIO) -> list[StopReason]:
    """Lead a process group that obeys commands and signals; return the list that collects stop reasons."""
    become_leader()
    stop: list[StopReason] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # SIGTERM: the node is being shut down; save and exit.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stop.append(StopReason.SHUTDOWN))
    threading.Thread(target=_listen, args=(commands, stop), daemon=True).start()
    return stop


class _Reporter:
    """Reports the progress of one rank to the client, and stop requests to training."""

    def __init__(self, send: Callable[[bytes], object], seat: Seat, stop: Sequence[StopReason]) -> None:
        self.started = self._told = time.monotonic()
        self.last: Measurement | None = None
        self._send, self._seat, self._stop = send, seat, stop

    def tell(self, message: Mapping[str, object]) -> None:
        self._told = time.monotonic()
        self._send(_line({"rank": self._seat.rank, **message}))

    def report(self, measurement: Measurement) -> None:
        self.last = measurement
        if self._seat.rank == 0:
            self.tell({"measurement": to_plain(measurement)})

    def stop_requested(self) -> StopReason | None:
        # Training asks after every step and evaluation batch, which is a sign of progress.
        if self._seat.local_rank == 0 and time.monotonic() - self._told > ALIVE_EVERY_S:
            self.tell({"alive": True})
        return self._stop[0] if self._stop else None


def leave(
    send: Callable[[bytes], object], message: Mapping[str, object] | None, *, exit_code: int = 0
) -> NoReturn:
    """Send the last message and exit, without running atexit handlers."""
    if message is not None:
        send(_line(message))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def environment_of(job: TrialJob, seat: Seat) -> dict[str, str | None]:
    """Return the environment variables that the attempt's libraries need; None unsets a variable.

    All devices of the attempt on this node are visible, and no others: ranks map each other's memory.
    """
    here = [job.device_uuids[rank] for rank in seat.ranks_here]
    return {
        **device_of(job).environment(here),
        "TOKENIZERS_PARALLELISM": "false",  # a used Rust thread pool would warn about forks
        **seat_environment(job, seat),
    }


def set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _listen(commands: BinaryIO, stop: list[StopReason]) -> None:
    """Receive stop commands; at their end, kill this process group."""
    for line in commands:
        stop.append(StopReason(json.loads(line)["stop"]))
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def set_num_threads(num_threads: int) -> None:
    """Set the number of CPU threads for libraries, loaded or not."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(num_threads)


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, allow_nan=False).encode() + b"\n"
