"""Conversion between rows of our tables and frozen values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import sqlalchemy as sa

from autosft.studies.metrics import current_name
from autosft.studies.search.dimensions import Value
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    FailureKind,
    Measurement,
    PinnedSettings,
    TrainingSettings,
    TrialRecord,
    TrialState,
)
from autosft.studies.values import (
    AttemptRecord,
    CheckpointRecord,
    CheckpointScore,
    Command,
    CommandKind,
    MemoryObservation,
    UntunedScore,
)
from autosft.studies.wire import from_plain, to_plain

T = TypeVar("T")
Row = sa.RowMapping


def dump(value: object) -> str:
    """Serialize a frozen value, or plain dicts and lists, to the JSON of a column."""
    return json.dumps(to_plain(value), ensure_ascii=False)


def load(kind: type[T], text: str) -> T:
    return from_plain(kind, json.loads(text))


_TRIAL_COLUMNS = (
    "number",
    "state",
    "origin",
    "parameters",
    "settings",
    "plan",
    "num_attempts",
    "value",
    "best_step",
    "best_checkpoint",
    "failure",
    "message",
    "started_at",
    "finished_at",
)


def trial_columns(trial: TrialRecord) -> dict[str, Any]:
    """Return the columns of a trial, except its study and when it was asked."""
    return {name: _trial_cell(getattr(trial, name)) for name in _TRIAL_COLUMNS}


def changed_columns(before: TrialRecord, after: TrialRecord) -> dict[str, Any]:
    """Return the columns of a trial that have changed."""
    changed = [name for name in _TRIAL_COLUMNS if getattr(before, name) != getattr(after, name)]
    return {name: _trial_cell(getattr(after, name)) for name in changed}


def _trial_cell(value: object) -> object:
    """Return the column value of a trial's field."""
    if isinstance(value, TrialState | FailureKind):
        return value.value
    if isinstance(value, TrainingSettings | ExecutionPlan):
        return dump(value)
    return dump(dict(value)) if isinstance(value, tuple) else value  # parameters


def parameters_from(row: Row) -> dict[str, Value]:
    parameters: dict[str, Value] = json.loads(row["parameters"])
    return parameters


def trial_from(row: Row, measurements: tuple[Measurement, ...]) -> TrialRecord:
    return TrialRecord(
        number=row["number"],
        state=TrialState(row["state"]),
        settings=load(TrainingSettings, row["settings"]),
        parameters=tuple(parameters_from(row).items()),
        origin=row["origin"],
        plan=None if row["plan"] is None else load(ExecutionPlan, row["plan"]),
        num_attempts=row["num_attempts"],
        value=row["value"],
        best_step=row["best_step"],
        best_checkpoint=row["best_checkpoint"],
        failure=None if row["failure"] is None else FailureKind(row["failure"]),
        message=row["message"],
        measurements=measurements,
        started_at=row["started_at"],
        finished_at=row["finished_at"],
    )


def attempt_end_columns(end: AttemptEnd, *, now: float) -> dict[str, Any]:
    cause = end.failure or end.stopped
    assert end.completed or cause is not None, "an attempt that did not complete was stopped or failed"
    return {
        "ended_at": now,
        "outcome": "completed" if cause is None else cause.value,
        "message": end.message,
        "log_path": end.log_path,
        "peak_allocated_bytes": end.peak_allocated_bytes,
        "peak_reserved_bytes": end.peak_reserved_bytes,
        "duration_s": end.duration_s,
        "eval_fingerprint": end.eval_fingerprint,
    }


def attempt_from(row: Row) -> AttemptRecord:
    """Build an attempt from its columns and its trial's number."""
    plan = load(ExecutionPlan, row["plan"])
    same = ("trial", "number", "started_at", "ended_at", "outcome", "log_path")
    peaks = ("peak_allocated_bytes", "peak_reserved_bytes")
    return AttemptRecord(
        device_name=plan.device_name,
        device_uuids=tuple(json.loads(row["device_uuids"])),
        message=row["message"] or "",
        predicted_bytes=plan.estimate.total_bytes,
        **{name: row[name] for name in (*same, *peaks)},
    )


_MEASUREMENT_NUMBERS = (
    "step",
    "num_steps",
    "num_tokens",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_s",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "checkpoint",
    "elapsed_s",
    "temperature_c",
)


def measurement_columns(measurement: Measurement) -> dict[str, Any]:
    numbers = {name: getattr(measurement, name) for name in _MEASUREMENT_NUMBERS}
    return {
        **numbers,
        "evaluation": measurement.evaluation or 0,
        "metrics": dump(dict(measurement.metrics)),
        "throttle_reasons": None
        if measurement.throttle_reasons is None
        else dump(measurement.throttle_reasons),
    }


def measurement_from(row: Row) -> Measurement:
    """Build a measurement from its columns and its trial's and attempt's number."""
    metrics = load(tuple[tuple[str, float], ...], json.dumps(list(json.loads(row["metrics"]).items())))
    return Measurement(
        trial=row["trial"],
        attempt=row["attempt"],
        metrics=metrics,
        evaluation=row["evaluation"] or None,
        throttle_reasons=None
        if row["throttle_reasons"] is None
        else load(tuple[str, ...], row["throttle_reasons"]),
        **{name: row[name] for name in _MEASUREMENT_NUMBERS},
    )


def checkpoint_columns(checkpoint: CheckpointRecord) -> dict[str, Any]:
    """Return the columns of a checkpoint, except its trial's id."""
    names = CheckpointRecord.__dataclass_fields__.keys() - {"trial"}
    return {name: getattr(checkpoint, name) for name in names}


def checkpoint_from(row: Row) -> CheckpointRecord:
    return CheckpointRecord(**{name: row[name] for name in CheckpointRecord.__dataclass_fields__})


def score_columns(score: CheckpointScore) -> dict[str, Any]:
    """Return the columns of a score, except its trial's id."""
    names = CheckpointScore.__dataclass_fields__.keys() - {"trial"}
    return {name: getattr(score, name) for name in names}


def score_from(row: Row) -> CheckpointScore:
    values: dict[str, Any] = {name: row[name] for name in CheckpointScore.__dataclass_fields__}
    return CheckpointScore(**{**values, "metric": current_name(values["metric"])})


def untuned_columns(score: UntunedScore) -> dict[str, Any]:
    """Return the columns of an untuned model's score, but its study's id."""
    return {
        "metrics": dump(dict(score.metrics)),
        "duration_s": score.duration_s,
        "recorded_at": score.recorded_at,
    }


def untuned_from(row: Row) -> UntunedScore:
    metrics = tuple((current_name(name), value) for name, value in json.loads(row["metrics"]).items())
    return UntunedScore(metrics=metrics, duration_s=row["duration_s"], recorded_at=row["recorded_at"])


def command_from(row: Row) -> Command:
    return Command(
        id=row["id"],
        kind=CommandKind(row["kind"]),
        trial=row["trial"],
        parameters=tuple(parameters_from(row).items()),
        requested_at=row["requested_at"],
    )


_OBSERVATION_JSON: dict[str, type] = {
    "settings": TrainingSettings,
    "pinned": PinnedSettings,
    "plan": ExecutionPlan,
}


def observation_columns(observation: MemoryObservation) -> dict[str, Any]:
    columns = {name: getattr(observation, name) for name in MemoryObservation.__dataclass_fields__}
    return columns | {name: dump(columns[name]) for name in _OBSERVATION_JSON}


def observation_from(row: Row) -> MemoryObservation:
    columns: Mapping[str, Any] = {name: row[name] for name in MemoryObservation.__dataclass_fields__}
    values: dict[str, Any] = {name: load(kind, columns[name]) for name, kind in _OBSERVATION_JSON.items()}
    return MemoryObservation(**{**columns, **values})
