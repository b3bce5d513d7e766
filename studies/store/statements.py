"""SQL statements over the tables of trials: queue, trials, attempts, measurements.

Plain functions over an open connection; `StudyRecords` decides on the transactions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autosft.studies.advice import Advice, Cause
from autosft.studies.search.dimensions import Value
from autosft.studies.store import rows, tables
from autosft.studies.store.study_state import measurements_query
from autosft.studies.trial import AttemptEnd, ExecutionPlan, Measurement, TrialRecord
from autosft.studies.values import (
    AttemptRecord,
    CheckpointRecord,
    CheckpointScore,
    Command,
    MemoryObservation,
    UntunedScore,
)

_PENDING_COMMANDS = (  # executed once a second
    sa.select(tables.commands)
    .where(tables.commands.c.study_id == sa.bindparam("study_id"), tables.commands.c.done_at.is_(None))
    .order_by(tables.commands.c.id)
)


def insert_queued(
    connection: Connection, study_id: int, parameters: Mapping[str, Value], *, origin: str, now: float
) -> int:
    """Insert parameters into the queue; return the key of their row."""
    columns = {"study_id": study_id, "parameters": rows.dump(parameters), "origin": origin}
    return _key(connection.execute(sa.insert(tables.queue), {**columns, "enqueued_at": now}))


def insert_trial(
    connection: Connection, study_id: int, trial: TrialRecord, *, queued: int | None, now: float
) -> int:
    """Insert a trial and mark the queue's row that it came from as used; return the key of its row."""
    columns = {"study_id": study_id, "asked_at": now, **rows.trial_columns(trial)}
    inserted = connection.execute(sa.insert(tables.trials), columns)
    if queued is not None:
        taken = tables.queue.c.id == queued
        connection.execute(sa.update(tables.queue).where(taken), {"trial": trial.number})
    return _key(inserted)


def update_trial(connection: Connection, trial_id: int, before: TrialRecord, after: TrialRecord) -> None:
    """Write the changed columns of a trial."""
    if columns := rows.changed_columns(before, after):
        this = tables.trials.c.id == trial_id
        connection.execute(sa.update(tables.trials).where(this), columns)


def insert_attempt(
    connection: Connection,
    trial_id: int,
    number: int,
    *,
    plan: ExecutionPlan,
    device_uuids: tuple[str, ...],
    now: float,
) -> int:
    """Insert an attempt that starts now; return the key of its row."""
    columns = {
        "trial_id": trial_id,
        "number": number,
        "plan": rows.dump(plan),
        "device_uuids": rows.dump(device_uuids),
        "started_at": now,
    }
    return _key(connection.execute(sa.insert(tables.attempts), columns))


def end_attempt(connection: Connection, attempt_id: int, end: AttemptEnd, *, now: float) -> None:
    this = tables.attempts.c.id == attempt_id
    connection.execute(sa.update(tables.attempts).where(this), rows.attempt_end_columns(end, now=now))


def abandon_attempts(connection: Connection, attempt_ids: Iterable[int], *, now: float) -> None:
    """End the attempts of a dead driver."""
    for attempt_id in attempt_ids:
        this = tables.attempts.c.id == attempt_id
        connection.execute(sa.update(tables.attempts).where(this), {"ended_at": now, "outcome": "abandoned"})


def insert_measurement(
    connection: Connection, attempt_id: int, measurement: Measurement, *, now: float
) -> bool:
    """Insert a report; return False, changing nothing, if this step of this attempt is already stored.

    The checkpoint that an attempt saves when it is told to stop is reported after the progress of the same
    step: it is added to that report.
    """
    columns = {"attempt_id": attempt_id, **rows.measurement_columns(measurement)}
    if (known := connection.execute(_SAME_REPORT, columns).one_or_none()) is not None:
        if measurement.checkpoint is None or known.checkpoint is not None:
            return False
        this = tables.measurements.c.id == known.id
        connection.execute(sa.update(tables.measurements).where(this), {"checkpoint": columns["checkpoint"]})
        return True
    connection.execute(sa.insert(tables.measurements), {"recorded_at": now, **columns})
    return True


_SAME_REPORT = sa.select(tables.measurements.c.id, tables.measurements.c.checkpoint).where(
    *(tables.measurements.c[name] == sa.bindparam(name) for name in ("attempt_id", "step", "evaluation"))
)


def read_measurements(connection: Connection, study_id: int, number: int) -> tuple[Measurement, ...]:
    """Return all reports of a trial, by attempt and step."""
    query = measurements_query(study_id).where(tables.trials.c.number == number)
    return tuple(rows.measurement_from(row) for row in connection.execute(query).mappings())


def read_attempts(connection: Connection, study_id: int) -> tuple[AttemptRecord, ...]:
    """Return all attempts of a study, by trial and number."""
    query = (
        sa.select(tables.trials.c.number.label("trial"), tables.attempts)
        .join(tables.attempts, tables.attempts.c.trial_id == tables.trials.c.id)
        .where(tables.trials.c.study_id == study_id)
        .order_by(tables.trials.c.number, tables.attempts.c.number)
    )
    return tuple(rows.attempt_from(row) for row in connection.execute(query).mappings())


def _key(inserted: sa.CursorResult[tuple[object, ...]]) -> int:
    keys = inserted.inserted_primary_key
    assert keys is not None
    return int(keys[0])


def insert_checkpoint(connection: Connection, trial_id: int, checkpoint: CheckpointRecord) -> None:
    """Insert the record of a checkpoint, replacing one with the same path."""
    same = tables.checkpoints.c.path == checkpoint.path
    connection.execute(sa.delete(tables.checkpoints).where(same))
    columns = {"trial_id": trial_id, **rows.checkpoint_columns(checkpoint)}
    connection.execute(sa.insert(tables.checkpoints), columns)


def delete_checkpoints(connection: Connection, paths: Collection[str]) -> None:
    connection.execute(sa.delete(tables.checkpoints).where(tables.checkpoints.c.path.in_(paths)))


def insert_score(connection: Connection, trial_id: int, score: CheckpointScore) -> None:
    """Insert a score, replacing one of the same checkpoint on the same examples by the same metric."""
    table = tables.scores
    columns = {"trial_id": trial_id, **rows.score_columns(score)}
    same = [table.c[name] == columns[name] for name in ("trial_id", "step", "examples", "metric")]
    connection.execute(sa.delete(table).where(*same))
    connection.execute(sa.insert(table), columns)


def read_scores(connection: Connection, study_id: int) -> tuple[CheckpointScore, ...]:
    """Return a study's scores by trial, step and time of recording."""
    number = tables.trials.c.number.label("trial")
    query = sa.select(tables.scores, number).join(tables.trials).where(tables.trials.c.study_id == study_id)
    order = (tables.trials.c.number, tables.scores.c.step, tables.scores.c.id)
    return tuple(rows.score_from(row) for row in connection.execute(query.order_by(*order)).mappings())


def insert_untuned(connection: Connection, study_id: int, score: UntunedScore) -> bool:
    """Keep the score of a study's untuned model; False, and nothing changes, where there is one."""
    if read_untuned(connection, study_id) is not None:
        return False
    columns = {"study_id": study_id, **rows.untuned_columns(score)}
    connection.execute(sa.insert(tables.untuned), columns)
    return True


def read_untuned(connection: Connection, study_id: int) -> UntunedScore | None:
    """Return the score of a study's untuned model, None while there is none."""
    query = sa.select(tables.untuned).where(tables.untuned.c.study_id == study_id)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else rows.untuned_from(row)


def insert_advice(connection: Connection, trial_id: int, advice: Advice, *, now: float) -> None:
    """Insert advice, unless the same cause is already stored for the trial."""
    table = tables.advice
    same = table.c.trial_id == trial_id, table.c.cause == advice.cause.value
    if connection.scalar(sa.select(table.c.id).where(*same)) is None:
        columns = {"step": advice.step, "cause": advice.cause.value, "message": advice.message}
        connection.execute(sa.insert(table), {"trial_id": trial_id, "recorded_at": now, **columns})


def read_advice(connection: Connection, study_id: int) -> tuple[Advice, ...]:
    """Return a study's advice in the order in which it was given."""
    number = tables.trials.c.number.label("trial")
    query = sa.select(tables.advice, number).join(tables.trials).where(tables.trials.c.study_id == study_id)
    found = connection.execute(query.order_by(tables.advice.c.id)).mappings()
    return tuple(
        Advice(trial=row["trial"], step=row["step"], cause=Cause(row["cause"]), message=row["message"])
        for row in found
    )


def read_pending_commands(connection: Connection, study_id: int) -> tuple[Command, ...]:
    """Return the pending commands, oldest first."""
    found = connection.execute(_PENDING_COMMANDS, {"study_id": study_id}).mappings()
    return tuple(rows.command_from(row) for row in found)


def finish_command(connection: Connection, command_id: int, *, now: float) -> None:
    this = tables.commands.c.id == command_id
    connection.execute(sa.update(tables.commands).where(this), {"done_at": now})


def insert_observation(connection: Connection, observation: MemoryObservation) -> None:
    """Insert an observation, unless one of the same attempt is already stored."""
    table = tables.memory_observations
    same = [table.c[name] == getattr(observation, name) for name in ("study", "trial", "attempt")]
    if connection.scalar(sa.select(table.c.id).where(*same)) is None:
        connection.execute(sa.insert(table), rows.observation_columns(observation))
