"""The watch in front of a view: once per cause, told and recorded, also over a restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autosft.profiles.hardware.device import ClusterProfile
from autosft.scheduler.events import AdviceGiven, TrialMeasured
from autosft.scheduler.observers.advisor import LOOK_EVERY_S, Advisor
from autosft.studies.advice import Advice
from tests.scheduler.devices import GIB, gpu
from tests.studies.curves import curve


class Records:
    """Keeps advice, as StudyRecords does."""

    def __init__(self) -> None:
        self.kept: list[Advice] = []

    def add_advice(self, advice: Advice, *, now: float) -> None:
        self.kept.append(advice)

    def advice(self) -> tuple[Advice, ...]:
        return tuple(self.kept)


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def watched(
    records: Records,
    *,
    clock: Clock | None = None,
    refresh: Callable[[ClusterProfile], ClusterProfile] = lambda item: item,
) -> tuple[Advisor, list[Any]]:
    events: list[Any] = []
    before = ClusterProfile(devices=(gpu(),), driver_version=None, cuda_version=None)
    watch = Advisor(
        records,  # type: ignore[arg-type]
        events.append,
        cluster=before,
        refresh=refresh,
        now=clock or Clock(),
    )
    return watch, events


def given(events: list[Any]) -> list[AdviceGiven]:
    return [event for event in events if isinstance(event, AdviceGiven)]


def test_a_cause_is_reported_and_recorded_once_even_after_a_restart() -> None:
    records = Records()
    for _ in range(2):
        watch, events = watched(records)
        for report in curve("learned by heart"):
            watch(TrialMeasured(measurement=report))
    assert [item.cause.value for item in records.kept if item.cause.value != "slower"] == ["overfitting"]
    assert not [item for item in given(events) if item.cause == "overfitting"]  # the second time
    assert len(events) - len(given(events)) == len(curve("learned by heart"))  # all events pass


def test_the_same_cause_in_another_trial_is_another_one() -> None:
    records = Records()
    watch, events = watched(records)
    for trial in (0, 1):
        for report in curve("too small a learning rate"):
            watch(TrialMeasured(measurement=replace(report, trial=trial)))
    told = [item.trial for item in given(events) if item.cause == "loss not falling"]
    assert told == [0, 1]


def test_memory_that_another_process_takes_is_reported_once_a_study() -> None:
    clock = Clock()
    taken = replace(gpu(), free_bytes=20 * GIB)
    after = ClusterProfile(devices=(taken,), driver_version=None, cuda_version=None)
    records = Records()
    watch, events = watched(records, clock=clock, refresh=lambda _: after)
    [report, *_] = curve("learns")
    for trial in (0, 1):
        clock.s += LOOK_EVERY_S / 2  # not yet, then yes
        watch(TrialMeasured(measurement=replace(report, trial=trial)))
        watch(TrialMeasured(measurement=replace(report, trial=trial)))
    clock.s += 10 * LOOK_EVERY_S
    watch(TrialMeasured(measurement=report))
    [advice] = given(events)
    assert "another process has taken 4.0 GiB" in advice.message
