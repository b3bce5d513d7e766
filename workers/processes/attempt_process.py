"""The process of one attempt, from the fork to its exit.

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from autosft.studies.trial import AttemptEnd, Measurement, StopReason, TrialJob
from autosft.studies.wire import from_plain, to_plain
from autosft.workers.device import device_of
from autosft.workers.processes.failures import failed
from autosft.workers.processes.logs import redirect_output
from autosft.workers.processes.memory_limit import (
    data_segment_bytes,
    lift_data_limit,
    limit_data_segment,
)
from autosft.workers.ranks import Seat, seat_environment

#: How often an attempt with nothing to report sends a sign of progress.
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
    """Load ahead for an attempt like the job in `request`, wait for its request, and run it.

    Sends nothing before.  What goes wrong with loading is left to the attempt, which loads what is missing.
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
    if "function" not in message:  # told to stop, or nobody is left who would tell
        os._exit(0)
    run_attempt(message, send, commands, inherited_bytes=inherited_bytes)


def run_call(request: Mapping[str, Any], send: Callable[[bytes], object], commands: BinaryIO) -> NoReturn:
    """Call a function by name, with plain arguments, and send what it returns, which must be plain too.

    For what needs tensors besides attempts, such as generating answers: see `process.call`.
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
    """Lead a process group of one's own, so that it can be killed as one."""
    with contextlib.suppress(AttributeError, OSError):  # Windows; already a session leader
        os.setsid()


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
    """Run one rank of an attempt in this process, which is its own from here on, and end the process.

    `send` takes lines for the client; `commands` yields {"stop": reason} lines and ends when nobody is left
    who wants the result.  Of several ranks only the first reports, and any that fails; the exit code is 1
    after an exception, which the others would wait for in vain, else 0.  `inherited_bytes`: the data segment
    before anything of the attempt was loaded, where that was before now.
    """
    become_leader()
    stop: list[StopReason] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A node that is taken away says SIGTERM: save and leave.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: stop.append(StopReason.SHUTDOWN))
    threading.Thread(target=_listen, args=(commands, stop), daemon=True).start()

    started = told = time.monotonic()
    last: Measurement | None = None
    seat = Seat(rank=request["rank"], ranks_here=tuple(request["ranks"]))

    def tell(message: dict[str, object]) -> None:
        nonlocal told
        told = time.monotonic()
        send(_line({"rank": seat.rank, **message}))

    def report(measurement: Measurement) -> None:
        nonlocal last
        last = measurement
        if seat.rank == 0:
            tell({"measurement": to_plain(measurement)})

    def stop_requested() -> StopReason | None:
        # Training asks after every step and evaluation batch; that it does is the sign of life.
        if seat.local_rank == 0 and time.monotonic() - told > ALIVE_EVERY_S:
            tell({"alive": True})
        return stop[0] if stop else None

    tell({"pid": os.getpid()})
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
            )
        end = train(job, report, stop_requested)
    except BaseException as error:  # whatever it is, it ends this attempt and is told
        lift_data_limit()  # telling the failure takes memory too
        traceback.print_exc()
        end = failed(job, error, log_path, time.monotonic() - started, last)
        has_failed = True
    message = {"rank": seat.rank, "end": to_plain(end)} if seat.rank == 0 or has_failed else None
    leave(send, message, exit_code=int(has_failed))


def leave(
    send: Callable[[bytes], object], message: Mapping[str, object] | None, *, exit_code: int = 0
) -> NoReturn:
    """Send the last message and end the process, without atexit handlers: it is not worth a tidy end."""
    if message is not None:
        send(_line(message))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def environment_of(job: TrialJob, seat: Seat) -> dict[str, str | None]:
    """Return what the attempt's libraries must find in the environment, or must not (None).

    All devices that the attempt has on this node and no others: ranks exchange memory of each other's.
    """
    here = [job.device_uuids[rank] for rank in seat.ranks_here]
    return {
        **device_of(job).environment(here),
        "TOKENIZERS_PARALLELISM": "false",  # data come tokenized; a used Rust pool would warn of the fork
        **seat_environment(job, seat),
    }


def set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _listen(commands: BinaryIO, stop: list[StopReason]) -> None:
    """Take stop commands; when they end, so does this process group."""
    for line in commands:
        stop.append(StopReason(json.loads(line)["stop"]))
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def set_num_threads(num_threads: int) -> None:
    """Set the CPU threads of libraries that are loaded and of those that are not yet."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(num_threads)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(num_threads)


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, allow_nan=False).encode() + b"\n"
