"""Monitors one attempt from outside its processes: its reports, requests to stop it, and why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, StopReason, TrialEvent, TrialJob
from autosft.studies.wire import WireError, from_plain, to_plain
from autosft.workers.device import device_of
from autosft.workers.processes.failures import told
from autosft.workers.processes.starters import SocketChannel, Starter

TRAIN_FUNCTION = "autosft.workers.training.train:train"
PREPARE_FUNCTION = "autosft.workers.training.train:load_ahead"

# An attempt that was asked to stop may finish its step and save, but a hung one must not keep its device.
STOP_GRACE_S = 60.0
#: Added to it, in units of the attempt's slowest step so far: the step that was begun, and room to save.
STOP_GRACE_STEPS = 2.0

#: A step may take this many times its predicted duration, on a machine that is shared.
SLOWEST_STEP_RATIO = 20.0
#: Lower bounds for writing and hashing a checkpoint, and for downloading a model's weights.
SLOWEST_DISK_BYTES_PER_S = 100e6
SLOWEST_DOWNLOAD_BYTES_PER_S = 10e6


def hang_limit_s(job: TrialJob, *, has_begun: bool) -> float:
    """Return how long an attempt may show no progress before it counts as hung.

    Between two signs of progress lies one optimizer step, one evaluation batch, or the writing of a
    checkpoint; before the first (`has_begun` is false), the imports and the loading of the model.
    """
    plan, settings = job.plan, job.settings
    num_steps = max(1, settings.num_train_examples // settings.effective_batch_size)
    step_s = SLOWEST_STEP_RATIO * plan.predicted_duration_s / num_steps
    held = dict(plan.estimate.components)
    num_bytes = plan.data_parallel * (held.get("parameters", 0) + held.get("optimizer state", 0))
    if has_begun:
        return 120.0 + step_s + num_bytes / SLOWEST_DISK_BYTES_PER_S
    return 600.0 + step_s + num_bytes / SLOWEST_DOWNLOAD_BYTES_PER_S


def stop_needs_s(job: TrialJob, slowest_step_s: float) -> float:
    """Return how long an attempt may need from a stop to its end: two steps and a checkpoint, on a slow disk.

    `slowest_step_s` is what a step took at most so far on this machine, 0 before one was measured: then as
    long as predicted, and as long again.
    """
    plan, settings = job.plan, job.settings
    num_steps = max(1, settings.num_train_examples // settings.effective_batch_size)
    step_s = max(slowest_step_s, 2.0 * plan.predicted_duration_s / num_steps * (slowest_step_s == 0.0))
    held = dict(plan.estimate.components)
    num_bytes = plan.data_parallel * (held.get("parameters", 0) + held.get("optimizer state", 0))
    return STOP_GRACE_STEPS * step_s + num_bytes / SLOWEST_DISK_BYTES_PER_S


def log_path_of(job: TrialJob) -> Path:
    """Return the log file of an attempt."""
    return Path(job.output_dir) / f"attempt-{job.attempt}.log"


class HangLimit(Protocol):
    """The longest time without progress, in seconds (`hang_limit_s`)."""

    def __call__(self, job: TrialJob, *, has_begun: bool) -> float: ...


class Attempt:
    """One running attempt; iterate over `events()` once, call the other methods from any thread."""

    def __init__(
        self,
        starter: Starter,
        job: TrialJob,
        *,
        function: str = TRAIN_FUNCTION,
        stop_grace_s: float = STOP_GRACE_S,
        hang_limit_s: HangLimit = hang_limit_s,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Start one process for each of `ranks`: those whose devices are on this machine (None: all of them).

        Raises `OSError` if `starter` cannot reach its server.
        """
        self.job = job
        self.pids: dict[int, int] = {}  # by rank
        self._ranks = list(range(len(job.device_uuids)) if ranks is None else ranks)
        self._log_path = log_path_of(job)
        self._started = time.monotonic()
        self._stop_grace_s = stop_grace_s
        self._stop_reason: StopReason | None = None
        self._last: Measurement | None = None
        self._last_at = self._started
        self._slowest_step_s = 0.0
        self._killer: threading.Timer | None = None
        self._killed = ""  # the reason, if we killed it
        self._hang_limit_s = hang_limit_s
        self._has_begun = False
        self._progressed = self._started
        self._is_over = False
        self._wake_watch = threading.Event()
        self._channel = starter.start(
            {
                "function": function,
                "job": to_plain(job),
                "log": str(self._log_path),
                "ranks": self._ranks,
            }
        )
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The process id of the first rank here, None until it has been reported."""
        return self.pids.get(self._ranks[0])

    def events(self) -> Iterator[TrialEvent]:
        """Yield the attempt's reports, and last its end, once its processes and their GPU memory are gone."""
        ends: dict[int, AttemptEnd] = {}  # by rank, in order of arrival
        exits: list[dict[str, Any]] | None = None
        try:
            for message in self._messages():
                if "measurement" in message:
                    self._observe(from_plain(Measurement, message["measurement"]))
                    assert self._last is not None
                    yield self._last
                elif "end" in message:
                    ends[message["rank"]] = from_plain(AttemptEnd, message["end"])
                elif "pid" in message:
                    self.pids[message["rank"]] = message["pid"]
                elif "exits" in message:
                    exits = message["exits"]
                elif "refused" in message:
                    why = f"no process can be started: {message['refused']}"
                    ends[0] = end_of(self.job, FailureKind.SURROUNDINGS, why)
        except WireError as error:  # the training function reported something else
            ends = {0: end_of(self.job, FailureKind.ERROR, f"unreadable report: {error}", last=self._last)}
        finally:
            self._is_over = True
            self._wake_watch.set()
            if self._killer is not None:
                self._killer.cancel()
            self._channel.close()
        for pid in self.pids.values():
            device_of(self.job).wait_until_released(pid, self.job.device_uuids)
        yield replace(self._end(ends, exits), log_path=str(self._log_path))

    def _messages(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError):  # reset, or closed by us
            for line in self._channel.lines:
                with contextlib.suppress(json.JSONDecodeError):  # empty, or cut off by a kill
                    message = json.loads(line)
                    self._progressed = time.monotonic()
                    if not self._has_begun and ("measurement" in message or "alive" in message):
                        self._has_begun = True
                        self._wake_watch.set()  # the limit is shorter from now on
                    yield message

    def _observe(self, measurement: Measurement) -> None:
        """Remember a measurement, and how long its steps took on this machine as it is."""
        now = time.monotonic()
        num_steps = measurement.step - (self._last.step if self._last is not None else measurement.step)
        if num_steps > 0:
            self._slowest_step_s = max(self._slowest_step_s, (now - self._last_at) / num_steps)
        self._last, self._last_at = measurement, now

    def stop(self, reason: StopReason) -> None:
        """Ask the attempt to end after its current step; it is killed if the grace period passes first."""
        if self._stop_reason is None:
            self._stop_reason = reason
            grace_s = self._stop_grace_s + stop_needs_s(self.job, self._slowest_step_s)
            too_late = f"killed because it had not stopped after {grace_s:.3g} s"
            self._killer = threading.Timer(grace_s, self.kill, [too_late])
            self._killer.daemon = True
            self._killer.start()
        self._channel.send({"stop": reason.value})

    def kill(self, why: str) -> None:
        """Kill the attempt's process group, after its threads' stacks have been written to its log."""
        self._killed = why
        self._channel.send({"kill": True})

    def _watch(self) -> None:
        while (left_s := self._hang_left_s()) > 0:
            self._wake_watch.wait(left_s)
            self._wake_watch.clear()
            if self._is_over:
                return
        self.kill(f"killed because it had made no progress for {time.monotonic() - self._progressed:.0f} s")

    def _hang_left_s(self) -> float:
        """Return the time left before the attempt counts as hung."""
        limit_s = self._hang_limit_s(self.job, has_begun=self._has_begun)
        return self._progressed + limit_s - time.monotonic()

    def close(self) -> None:
        """Abandon the attempt without waiting for its end."""
        self._channel.close()

    def _end(self, ends: Mapping[int, AttemptEnd], exits: Sequence[dict[str, Any]] | None) -> AttemptEnd:
        """Return how the attempt ended, given its ranks' reports and their exit statuses.

        When one rank fails, the others fail with it.  An unreported death (killed from outside, crashed)
        takes precedence over a reported failure, and both over a rank's complaint that it lost another one.
        """
        if 0 in ends and ends[0].failure is None:
            return ends[0]
        if exits is None and not ends:
            return self._end_without_report(None)
        unreported = [
            self._end_without_report(exited)
            for exited in exits or ()
            if exited["rank"] not in ends and (exited["rank"] == 0 or exited["status"] != 0)
        ]
        candidates = [
            *(end for end in unreported if end.failure is not FailureKind.ERROR),
            *(end for end in ends.values() if end.failure not in (None, FailureKind.WORKER_LOST)),
            *unreported,
            *ends.values(),
            end_of(self.job, None, ""),  # other ranks report nothing on success
        ]
        return candidates[0]

    def _end_without_report(self, exit_status: dict[str, Any] | None) -> AttemptEnd:
        failure, message = self._why(exit_status)
        if failure is not None:
            failure, message = told(self.job, failure, message)
        if failure is FailureKind.WORKER_LOST and exit_status is None and self._why_no_server():
            failure, message = FailureKind.NOT_STARTED, f"the warm server failed: {self._why_no_server()}"
        stopped = self._stop_reason if failure is None else None
        if exit_status is not None and len(self.job.device_uuids) > 1:
            message = f"rank {exit_status['rank']}: {message}"
        return end_of(
            self.job,
            failure,
            message,
            stopped=stopped,
            last=self._last,
            duration_s=time.monotonic() - self._started,
        )

    def _why_no_server(self) -> str:
        """Return the exception with which the server ended before it forked anything for this; "" if none.

        It would end so again: an import that fails, for example.  A server that was killed says nothing.
        """
        log = self._channel.server_log
        last = output_before_crash(log)[-1:] if log is not None and not self.pids else []
        return last[0] if last and re.match(r"[\w.]+(Error|Exception)\b", last[0]) else ""

    def _why(self, exit_status: dict[str, Any] | None) -> tuple[FailureKind | None, str]:
        """Return why a process ended that did not report its end."""
        if exit_status is None:
            server_log = self._channel.server_log
            said = " | ".join(output_before_crash(server_log)[-2:]) if server_log else ""
            return FailureKind.WORKER_LOST, f"the warm server is gone; its last output: {said or '(none)'}"
        status = exit_status["status"]
        if exit_status["oom_killed"]:
            return FailureKind.HOST_OUT_OF_MEMORY, "killed by the kernel because the host was out of memory"
        if self._killed and status < 0:
            if self._stop_reason is not None:
                return None, f"{self._stop_reason.value}; {self._killed}"
            return FailureKind.WORKER_LOST, self._killed
        output = output_before_crash(self._log_path)
        last_lines = " | ".join(output[-3:]) or "(none)"
        if status >= 0:
            return FailureKind.ERROR, f"exit code {status} without a result; its last output: {last_lines}"
        name = signal.Signals(-status).name
        if -status not in (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE):
            return FailureKind.WORKER_LOST, f"killed by {name}"
        for line in output:
            # Rust and C++ abort when an allocation fails.
            if "memory allocation of" in line or "bad_alloc" in line:
                return device_of(self.job).host_allocation_failure, line
        return FailureKind.ERROR, f"crashed with {name}; its last output: {last_lines}"


def end_of(
    job: TrialJob,
    failure: FailureKind | None,
    message: str,
    *,
    stopped: StopReason | None = None,
    last: Measurement | None = None,
    duration_s: float = 0.0,
) -> AttemptEnd:
    """Return the end of an attempt that could not report it itself."""
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
            text = log.read(max_bytes).decode(errors="replace")
    except OSError:
        return []
    before, _, _ = text.partition("Fatal Python error:")
    return [line.strip() for line in before.splitlines() if line.strip()]


def wait_until_gone(socket_path: Path, job: TrialJob, *, timeout_s: float = 10.0) -> bool:
    """Kill what is left of a job's attempt; return whether its end was confirmed in time.

    For attempts that are no longer monitored.  Raises `OSError` if the server is gone, and with it the
    attempt.
    """
    channel = SocketChannel(socket_path, timeout_s=timeout_s)
    channel.send({"wait_until_gone": str(log_path_of(job))})
    answers = [json.loads(line)["gone"] for line in channel.lines if line.strip()]
    channel.close()
    for pid in (pid for pids in answers for pid in pids):
        device_of(job).wait_until_released(pid, job.device_uuids)
    return bool(answers)
