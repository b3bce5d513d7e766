"""A `TrialRunner` on a virtual clock: scripted learning curves and faults, no process, no waiting.

Deterministic: the same calls give the same events.  Time passes only in `events`, which jumps to the next
thing that happens.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from autosft.studies.trial import FailureKind, Measurement, StopReason, TrialEvent, TrialJob
from autosft.workers.runners.attempt_monitor import HangLimit, hang_limit_s
from tests.workers.scripted import FAILURES, Fault, Script, end, timeline


@dataclass(slots=True)
class _Attempt:
    job: TrialJob
    script: Script
    items: Iterator[Measurement | Fault]
    stop: StopReason | None = None
    is_hanging: bool = False


class FakeRunner:
    """Runs `script(job)` for every job.  `started` and `stopped` keep what was asked of it, in order."""

    def __init__(
        self,
        script: Callable[[TrialJob], Script],
        *,
        start_s: float = 1_000_000.0,
        stop_grace_s: float = 60.0,
        hang_limit_s: HangLimit = hang_limit_s,
    ) -> None:
        self.started: list[TrialJob] = []
        self.prepared: list[TrialJob] = []
        self.stopped: list[tuple[int, int, StopReason]] = []
        self._script = script
        self._now = start_s
        self._stop_grace_s = stop_grace_s
        self._hang_limit_s = hang_limit_s
        self._attempts: dict[tuple[int, int], _Attempt] = {}
        self._due: list[tuple[float, int, tuple[int, int]]] = []  # time, order of scheduling, attempt
        self._num_scheduled = 0

    @property
    def num_running(self) -> int:
        return len(self._attempts)

    def run(self, job: TrialJob) -> None:
        key = job.trial, job.attempt
        assert key not in self._attempts, f"attempt {key} runs already"
        script = self._script(job)
        self.started.append(job)
        self._attempts[key] = _Attempt(job=job, script=script, items=timeline(job, script))
        self._schedule(key, script.step_s)

    def prepare(self, job: TrialJob) -> None:
        self.prepared.append(job)

    def events(self, timeout_s: float) -> Sequence[TrialEvent]:
        deadline = self._now + timeout_s
        while self._due and self._due[0][0] <= deadline:
            self._now = self._due[0][0]
            events: list[TrialEvent] = []
            while self._due and self._due[0][0] <= self._now:
                _, _, key = heapq.heappop(self._due)
                if key in self._attempts:
                    events += self._step(key)
            if events:
                return events
        self._now = deadline
        return ()

    def _step(self, key: tuple[int, int]) -> list[TrialEvent]:
        attempt = self._attempts[key]
        if attempt.stop is not None:
            return [self._end(key, stopped=attempt.stop)]
        item = next(attempt.items, None)
        if isinstance(item, Measurement):
            self._schedule(key, attempt.script.step_s)
            return [item]
        if item is Fault.HANG and attempt.is_hanging:  # and nobody has stopped it
            return [self._end(key, failure=FailureKind.WORKER_LOST)]
        if item is Fault.HANG:
            attempt.is_hanging = True
            attempt.items = chain([item], attempt.items)
            self._schedule(key, self._hang_limit_s(attempt.job, has_begun=True))
            return []
        if item is Fault.WAIT:
            return []
        if item is not None:
            return [self._end(key, failure=FAILURES[item])]
        return [self._end(key)]

    def _end(
        self, key: tuple[int, int], *, stopped: StopReason | None = None, failure: FailureKind | None = None
    ) -> TrialEvent:
        # Nothing that was due for this attempt may wake a later one of the same number.
        self._due = [item for item in self._due if item[2] != key]
        heapq.heapify(self._due)
        attempt = self._attempts.pop(key)
        return end(attempt.job, stopped=stopped, failure=failure, peak_bytes=attempt.script.peak_bytes)

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        self.stopped.append((trial, attempt, reason))
        running = self._attempts.get((trial, attempt))
        if running is not None and running.stop is None:
            running.stop = reason
            self._schedule((trial, attempt), self._stop_grace_s if running.is_hanging else 0.0)

    def now(self) -> float:
        return self._now

    def pass_time(self, seconds: float) -> None:
        """Let time pass outside `events`, as when the loop itself is slow."""
        self._now += seconds

    def lose(self, trial: int, attempt: int) -> TrialEvent:
        """Lose a running attempt's worker now; returns the end that is not delivered by `events` any more."""
        return self._end((trial, attempt), failure=FailureKind.WORKER_LOST)

    def close(self, *, grace_s: float) -> None:
        self._attempts.clear()
        self._due.clear()

    def _schedule(self, key: tuple[int, int], delay_s: float) -> None:
        self._num_scheduled += 1
        heapq.heappush(self._due, (self._now + delay_s, self._num_scheduled, key))
