"""The state of a running study as its events tell it, and how to phrase it.

Plain values and functions without a terminal, shared by the live view and the plain lines.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from autosft.scheduler.decide.remaining import left_s
from autosft.scheduler.events import (
    NewBest,
    Note,
    StudyEvent,
    StudyOpened,
    TrialEnded,
    TrialForecast,
    TrialMeasured,
    TrialStarted,
    UntunedScored,
    Waiting,
)
from autosft.studies.formatting import format_duration, format_metric
from autosft.studies.search.dimensions import Value
from autosft.studies.trial import Measurement, TrialRecord, TrialState

GIB = 1 << 30
MIB = 1 << 20


@dataclass(slots=True)
class TrialRow:
    """What is known about a trial."""

    record: TrialRecord
    device_names: tuple[str, ...]
    started_at: float  # UNIX seconds, of the running or last attempt
    first: Measurement | None = None  # of the attempt
    latest: Measurement | None = None
    latest_at: float = 0.0  # UNIX seconds
    value: float | None = None  # the study's metric at the latest evaluation
    peak_bytes: int | None = None
    forecast: TrialForecast | None = None  # of a freeze-thaw search, at the latest evaluation
    ended_at: float | None = None
    is_earlier: bool = False  # from an earlier run of the study, not resumed

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def state(self) -> TrialState:
        return self.record.state

    @property
    def is_running(self) -> bool:
        return self.ended_at is None

    @property
    def share_done(self) -> float:
        """Share of the optimizer steps, 0..1."""
        return self.latest.step / max(1, self.latest.num_steps) if self.latest else 0.0


@dataclass(slots=True)
class Progress:
    """What is known about a study; only `apply` changes it."""

    opened: StudyOpened | None = None
    rows: dict[int, TrialRow] = field(default_factory=dict)
    best: NewBest | None = None
    untuned: float | None = None  # the metric of the model before tuning
    forecast: TrialForecast | None = None  # the latest
    waiting: str = ""
    note: str = ""

    def apply(self, event: StudyEvent, *, now: float) -> None:
        """Update with an event; `now` in UNIX seconds."""
        match event:
            case StudyOpened():
                self.opened = event
                self.rows = {record.number: earlier_row(record) for record in event.earlier}
                self.best = best_of(event)
                self.untuned = event.untuned
            case UntunedScored(value=value):
                self.waiting, self.untuned = "", value
            case TrialStarted():
                self.waiting = ""
                before = self.rows.get(event.record.number)
                self.rows[event.record.number] = TrialRow(
                    record=event.record,
                    device_names=event.device_names,
                    started_at=now,
                    forecast=before.forecast if before else None,
                )
            case TrialMeasured(measurement=measurement):
                if row := self.rows.get(measurement.trial):
                    self._measured(row, measurement, now=now)
            case TrialForecast():
                if row := self.rows.get(event.trial):
                    row.forecast = self.forecast = event
            case TrialEnded(record=record):
                row = self.rows.setdefault(
                    record.number, TrialRow(record=record, device_names=(), started_at=now)
                )
                row.record, row.ended_at = record, now
                row.value = record.value if record.value is not None else row.value
            case NewBest():
                self.best = event
            case Waiting():
                self.waiting = event.message
            case Note():
                self.note = event.message

    def _measured(self, row: TrialRow, measurement: Measurement, *, now: float) -> None:
        row.first = row.first or measurement
        row.latest, row.latest_at = measurement, now
        row.peak_bytes = max(row.peak_bytes or 0, measurement.peak_allocated_bytes or 0) or None
        value = measurement.metric(self.opened.metric) if self.opened else None
        row.value = row.value if value is None else value

    @property
    def num_trials(self) -> int:
        return self.opened.num_trials if self.opened else 0

    @property
    def num_finished(self) -> int:
        """Finished trials of the study, including those of earlier runs."""
        earlier = self.opened.num_finished if self.opened else 0
        return earlier + sum(row.state.is_finished and not row.is_earlier for row in self.rows.values())

    @property
    def running(self) -> list[TrialRow]:
        return [row for row in self.rows.values() if row.is_running]

    def defaults(self) -> Mapping[str, Value]:
        """Return the parameters of the rule-based default trial, if it is known."""
        for row in self.rows.values():
            if row.record.is_default:
                return dict(row.record.parameters)
        return {}


def earlier_row(record: TrialRecord) -> TrialRow:
    """Return a trial from an earlier run of the study."""
    started_at = record.started_at or 0.0
    return TrialRow(
        record=record,
        device_names=() if record.plan is None else (record.plan.device_name,),
        started_at=started_at,
        latest=record.measurements[-1] if record.measurements else None,
        value=record.value,
        peak_bytes=max((each.peak_allocated_bytes or 0 for each in record.measurements), default=0) or None,
        ended_at=record.finished_at or started_at,
        is_earlier=True,
    )


def best_of(opened: StudyOpened) -> NewBest | None:
    """Return the best of the earlier trials."""
    values = [
        NewBest(trial=record.number, value=record.value, step=record.best_step or 0)
        for record in opened.earlier
        if record.value is not None and record.state is not TrialState.INFEASIBLE
    ]
    sign = 1 if opened.minimize else -1
    return min(values, key=lambda best: sign * best.value, default=None)


# Time left


def time_left_s(progress: Progress, *, now: float) -> float | None:
    """Return roughly how long the study will still run, or None while nothing is known.

    Running trials keep their pace.  Future ones take the average time of the finished ones, pruned ones
    included; before the first has finished, the share of a full run that the plan expects with its pruning,
    and as many at once as planned.  Never beyond the deadline.
    """
    opened, running = progress.opened, progress.running
    if opened is None or not progress.num_trials:
        return None
    remaining = [rest_s for row in running if (rest_s := remaining_s(row, now=now)) is not None]
    trial_s = mean_trial_s(progress, now=now)
    if trial_s is None:
        return None
    num_to_come = progress.num_trials - progress.num_finished - len(running)
    rest_s = left_s(
        remaining, num_to_come=num_to_come, trial_s=trial_s, num_slots=len(running) or opened.num_slots
    )
    return rest_s if opened.deadline is None else max(0.0, min(rest_s, opened.deadline - now))


def mean_trial_s(progress: Progress, *, now: float) -> float | None:
    """Return how long a trial takes on average: as those did that are over, else as the plan expects it."""
    lasted = [
        row.ended_at - row.started_at
        for row in progress.rows.values()
        if row.ended_at is not None and row.state.is_finished and row.ended_at > row.started_at
    ]
    if lasted:
        return statistics.mean(lasted)
    share = progress.opened.expected_share if progress.opened else 1.0
    full = [now - row.started_at + (remaining_s(row, now=now) or 0.0) for row in progress.running]
    return share * statistics.mean(full) if full else None


def remaining_s(row: TrialRow, *, now: float) -> float | None:
    """Return roughly how long a running trial still takes, from its own reports, else from its plan."""
    first, latest = row.first, row.latest
    if latest and latest.remaining_s is not None:
        return max(0.0, latest.remaining_s - (now - row.latest_at))
    if first and latest and latest.step > first.step:
        pace_s = (latest.elapsed_s - first.elapsed_s) / (latest.step - first.step)
        return pace_s * (latest.num_steps - latest.step)
    if row.record.plan is None:
        return None
    return max(0.0, row.record.plan.predicted_duration_s - (now - row.started_at))


# Phrasing


def memory_text(measured_bytes: int | None, bound_bytes: int | None) -> str:
    """Format measured memory and the predicted bound in one unit: 310/420M, 5.1/6.0G."""
    if bound_bytes is None and measured_bytes is None:
        return ""
    unit, divisor, digits = (
        ("G", GIB, 1) if max(bound_bytes or 0, measured_bytes or 0) >= GIB else ("M", MIB, 0)
    )
    measured = "-" if measured_bytes is None else f"{measured_bytes / divisor:.{digits}f}"
    bound = "-" if bound_bytes is None else f"{bound_bytes / divisor:.{digits}f}"
    return f"{measured}/{bound}{unit}"


def against_untuned(best: NewBest) -> str:
    """Say how the best so far compares with the untuned model; empty where that is not known."""
    difference = best.over_untuned
    if difference is None:
        return ""
    if difference.is_tie:
        return f"not better than untuned beyond chance ({difference.amount()})"
    return f"{'better' if difference.is_better else 'worse'} than untuned: {difference.amount()}"


def predicted_end(forecast: TrialForecast | None, plus_minus: str = "±") -> str:
    """Format a trial's predicted end with half of its 95 % interval: 0.312±0.02; empty if there is none."""
    if forecast is None:
        return ""
    half = (forecast.high - forecast.low) / 2
    return f"{format_metric(forecast.end)}{plus_minus}{half:.2g}"


def describe_forecast(forecast: TrialForecast, metric: str) -> str:
    """Say what is expected of a trial, and why it goes on or is paused."""
    low, high = format_metric(forecast.low), format_metric(forecast.high)
    does = "goes on" if forecast.goes_on else "paused"
    return f"{does}: {metric} {low} to {high} expected at its end; {forecast.reason}"


def about(seconds: float | None) -> str:
    """Format the time left, rounded to what is known."""
    if seconds is None:
        return ""
    step_s = 5 if seconds < 60 else 10 if seconds < 600 else 60
    return f"about {format_duration(max(1, math.ceil(seconds / step_s)) * step_s)} left"


def waiting_text(message: str) -> str:
    """Format why nothing can start."""
    return f"waiting: {message.removeprefix('Waiting').lstrip(' .:')}"


def describe_end(row: TrialRow, metric: str) -> str:
    """Describe in one line how a trial's attempt ended."""
    record = row.record
    text = record.state.value
    if record.failure is not None:
        text += f" ({record.failure.value})"
    if record.value is not None:
        text += f": {metric} {format_metric(record.value)}"
        text += f" at step {record.best_step}" if record.best_step is not None else ""
    if row.ended_at is not None and row.ended_at - row.started_at >= 1:
        text += f", {format_duration(row.ended_at - row.started_at)}"
    return text
