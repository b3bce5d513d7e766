"""Follows one attempt from outside its process: what it reports, how it is stopped, why it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, StopReason, TrialEvent, TrialJob
from autosft.studies.wire import WireError, from_plain, to_plain
from autosft.workers.attempt import runs_on_cpu
from autosft.workers.process import SocketChannel, Starter

TRAIN_FUNCTION = "autosft.workers.training:train"

# After it was asked to stop, an attempt may finish its step and save; a hung one must not hold its device.
STOP_GRACE_S = 60.0


def silence_limit_s(job: TrialJob) -> float:
    """Return how long an attempt may report nothing before it is taken for hung.

    Generous, as a report may stand behind the loading of a large model or a whole evaluation: ten minutes
    over the predicted duration of the run.
    """
    return 600.0 + job.plan.predicted_duration_s


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
        silence_limit_s: Callable[[TrialJob], float] = silence_limit_s,
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
        self._killed = ""  # why, if it was us
        self._silence_limit_s = silence_limit_s(job)
        self._heard = self._started
        self._is_over = threading.Event()
        self._channel = starter.start(
            {"function": function, "job": to_plain(job), "log": str(self._log_path)}
        )
        threading.Thread(target=self._watch_silence, daemon=True).start()

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
        except WireError as error:  # a training function that reports what is no measurement
            end = end_of(
                self.job, FailureKind.ERROR, f"a report that cannot be read: {error}", last=self._last
            )
        finally:
            self._is_over.set()
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
                self._heard = time.monotonic()
                with contextlib.suppress(json.JSONDecodeError):  # empty, or cut off by a kill
                    yield json.loads(line)

    def stop(self, reason: StopReason) -> None:
        """Ask the attempt to end after its current step; it is killed when it has not within the grace."""
        if self._stop_reason is None:
            self._stop_reason = reason
            too_late = f"killed, as it had not stopped in {self._stop_grace_s:g} s"
            self._killer = threading.Timer(self._stop_grace_s, self.kill, [too_late])
            self._killer.daemon = True
            self._killer.start()
        self._channel.send({"stop": reason.value})

    def kill(self, why: str) -> None:
        """Kill the attempt's process group; the stacks of its threads go to its log first."""
        self._killed = why
        self._channel.send({"kill": True})

    def _watch_silence(self) -> None:
        while (left_s := self._heard + self._silence_limit_s - time.monotonic()) > 0:
            if self._is_over.wait(left_s):
                return
        self.kill(f"killed, as nothing was heard of it for {self._silence_limit_s:g} s")

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
        if self._killed and status < 0:
            if self._stop_reason is not None:
                return None, f"{self._stop_reason.value}; {self._killed}"
            return FailureKind.WORKER_LOST, self._killed
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


def wait_until_gone(socket_path: Path, job: TrialJob, *, timeout_s: float = 10.0) -> bool:
    """Kill what is left of a job's attempt and wait until it is gone; whether that was seen in time.

    For attempts that nobody follows any more.  Raises `OSError` when the server is gone; then so are they.
    """
    channel = SocketChannel(socket_path, timeout_s=timeout_s)
    channel.send({"wait_until_gone": str(log_path_of(job))})
    pids = [json.loads(line)["gone"] for line in channel.lines if line.strip()]
    channel.close()
    if not runs_on_cpu(job):
        for pid in pids:
            wait_until_off_gpu(pid, job.device_uuids)
    return bool(pids)
