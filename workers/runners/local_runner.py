"""A runner without Ray: trials as local processes.  Used by `autosft train` and by tests."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from autosft.studies.trial import AttemptEnd, FailureKind, StopReason, TrialEvent, TrialJob
from autosft.workers.processes.failures import told
from autosft.workers.processes.starters import Starter
from autosft.workers.runners.attempt_monitor import TRAIN_FUNCTION, Attempt, end_of


class LocalRunner:
    """A `TrialRunner` over processes on this machine."""

    def __init__(self, starter: Starter, *, function: str = TRAIN_FUNCTION, **options: Any) -> None:
        """Run attempts in processes of `starter`, which `close` closes as well.

        Options as of `attempt_monitor.Attempt`.
        """
        self._starter = starter
        self._options = {"function": function, **options}
        self._events: queue.SimpleQueue[TrialEvent] = queue.SimpleQueue()
        self._running: dict[tuple[int, int], Attempt] = {}

    def run(self, job: TrialJob) -> None:
        """Start an attempt."""
        key = job.trial, job.attempt
        assert key not in self._running, f"attempt {key} runs already"
        try:
            attempt = Attempt(self._starter, job, **self._options)
        except OSError as error:
            failure, message = told(job, FailureKind.WORKER_LOST, f"no process could be started: {error}")
            self._events.put(end_of(job, failure, message))
            return
        self._running[key] = attempt
        threading.Thread(target=self._collect_events, args=(attempt,), daemon=True).start()

    def prepare(self, job: TrialJob) -> None:
        """Do nothing: only one attempt runs here at a time."""

    def _collect_events(self, attempt: Attempt) -> None:
        for event in attempt.events():
            self._events.put(event)

    def events(self, timeout_s: float) -> Sequence[TrialEvent]:
        """Return new events, waiting up to `timeout_s` for the first."""
        events: list[TrialEvent] = []
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        for event in events:
            if isinstance(event, AttemptEnd):
                self._running.pop((event.trial, event.attempt), None)
        return events

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        """Ask an attempt to end; does nothing if it is over."""
        if (running := self._running.get((trial, attempt))) is not None:
            running.stop(reason)

    def now(self) -> float:
        """Return UNIX seconds."""
        return time.time()

    def close(self, *, grace_s: float) -> None:
        """Stop all attempts, wait up to `grace_s`, then kill the rest with their server; discards events."""
        for attempt in self._running.values():
            attempt.stop(StopReason.SHUTDOWN)
        deadline = time.monotonic() + grace_s
        while self._running and (left_s := deadline - time.monotonic()) > 0:
            self.events(left_s)
        for attempt in self._running.values():
            attempt.close()
        self._running.clear()
        self._starter.close()
