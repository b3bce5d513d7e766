"""How much longer steps take than the processor works for them, on a clock that stands."""

from __future__ import annotations

import pytest

from autosft.workers.training import step_clock
from autosft.workers.training.step_clock import StepClock


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall_s = self.cpu_s = 0.0
        monkeypatch.setattr(step_clock.time, "monotonic", lambda: self.wall_s)
        monkeypatch.setattr(step_clock.time, "process_time", lambda: self.cpu_s)

    def step(self, clock: StepClock, wall_s: float, cpu_s: float) -> None:
        clock.begin()
        self.wall_s += wall_s
        self.cpu_s += cpu_s
        clock.end()


@pytest.mark.parametrize(
    ("num_threads", "wall_s", "cpu_s", "expected"),
    [(1, 2.0, 2.0, 1.0), (1, 4.0, 1.0, 4.0), (2, 2.0, 4.0, 1.0)],
)
def test_wall_over_processor_time(
    num_threads: int, wall_s: float, cpu_s: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    time, clock = Clock(monkeypatch), StepClock(num_threads)
    assert clock.slowdown is None
    time.step(clock, wall_s, cpu_s)
    assert clock.slowdown == pytest.approx(expected)


def test_what_lies_between_steps_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    time, clock = Clock(monkeypatch), StepClock(1)
    for _ in range(4):
        time.step(clock, 0.3, 0.3)
        time.wall_s += 100.0  # an evaluation
    assert clock.slowdown == pytest.approx(1.0)


def test_short_steps_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    time, clock = Clock(monkeypatch), StepClock(1)
    time.step(clock, 0.5, 0.1)
    assert clock.slowdown is None
    time.step(clock, 0.6, 0.1)
    assert clock.slowdown == pytest.approx(1.1 / 0.2)
