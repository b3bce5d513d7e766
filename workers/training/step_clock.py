"""Measure how long steps take, and how much slower that is than with cores of their own."""

from __future__ import annotations

import time

#: A ratio covers at least this many seconds of steps.
MIN_STRETCH_S = 1.0


class StepClock:
    """Times the steps of an attempt on a CPU: wall time over the time that its threads had a core."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._wall_s = self._cpu_s = 0.0
        self._begun = 0.0, 0.0
        self.slowdown: float | None = None  # over the last interval; None before the first

    def begin(self) -> None:
        """Record the time before a step."""
        self._begun = time.monotonic(), time.process_time()

    def end(self) -> None:
        """Record the time after a step."""
        wall, cpu = self._begun
        self._wall_s += time.monotonic() - wall
        self._cpu_s += time.process_time() - cpu
        if self._wall_s >= MIN_STRETCH_S and self._cpu_s > 0:
            self.slowdown = self._wall_s * self._num_threads / self._cpu_s
            self._wall_s = self._cpu_s = 0.0
