"""How long an attempt that was asked to stop may take, by the steps that it has been seen to take."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autosft.studies.trial import Measurement, StopReason
from autosft.studies.wire import to_plain
from autosft.workers.runners import attempt_monitor
from autosft.workers.runners.attempt_monitor import (
    SLOWEST_DISK_BYTES_PER_S,
    STOP_GRACE_S,
    STOP_GRACE_STEPS,
    Attempt,
    stop_needs_s,
)
from tests.workers.scripted import Script, make_job, timeline


class Clock:
    """Time that passes as it is told, and timers that note when they would ring."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def timer(self, delay_s: float, *_: Any) -> Clock:
        self.timers_s.append(delay_s)
        return self

    daemon = False

    def start(self) -> None: ...

    def cancel(self) -> None: ...


class Channel:
    """An attempt's process: reports a step each time as many seconds have passed."""

    server_log = None

    def __init__(self, clock: Clock, reports: list[tuple[float, Measurement]]) -> None:
        self.clock, self.reports = clock, reports
        self.sent: list[dict[str, Any]] = []

    @property
    def lines(self) -> Iterator[bytes]:
        for at_s, measurement in self.reports:
            self.clock.now_s = at_s
            yield json.dumps({"rank": 0, "measurement": to_plain(measurement)}).encode()

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("seconds", "slowest_s"),
    [((5.0,), 0.0), ((5.0, 7.0, 9.0), 2.0), ((5.0, 95.0, 97.0), 90.0)],
    ids=["no step measured", "quick steps", "one slow step"],
)
def test_the_grace_grows_with_the_slowest_step(
    seconds: tuple[float, ...], slowest_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    job = make_job(output_dir=tmp_path)
    script = Script(num_steps=8, eval_losses=(1.0,))  # evaluated at the end alone
    steps = [item for item in timeline(job, script) if isinstance(item, Measurement)]
    channel = Channel(clock, list(zip(seconds, steps, strict=False)))

    class Starter:
        def start(self, request: dict[str, Any]) -> Channel:
            return channel

    monkeypatch.setattr(attempt_monitor.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(attempt_monitor.threading, "Timer", clock.timer)
    monkeypatch.setattr(attempt_monitor.Attempt, "_watch", lambda self: None)
    attempt = Attempt(Starter(), job)  # type: ignore[arg-type]
    events = attempt.events()
    for _ in seconds:
        next(events)
    attempt.stop(StopReason.SHUTDOWN)
    # Before one is measured a step may take twice as long as predicted: 1 s for 4 steps.
    step_s = slowest_s or 2 * 0.25
    held = dict(job.plan.estimate.components)
    save_s = (held.get("parameters", 0) + held.get("optimizer state", 0)) / SLOWEST_DISK_BYTES_PER_S
    assert clock.timers_s == [pytest.approx(STOP_GRACE_S + STOP_GRACE_STEPS * step_s + save_s)]
    assert channel.sent == [{"stop": "shutdown"}]


def test_a_step_longer_than_the_usual_grace_is_waited_for(tmp_path: Path) -> None:
    """QLoRA of a 7B model on a consumer card: a step of some 80 s, before one was measured."""
    job = make_job(output_dir=tmp_path)
    slow = dataclasses.replace(job, plan=dataclasses.replace(job.plan, predicted_duration_s=4 * 80.0))
    assert stop_needs_s(slow, 0.0) > 2 * 80.0
    assert stop_needs_s(slow, 90.0) >= STOP_GRACE_STEPS * 90.0
