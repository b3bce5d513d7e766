"""Statements over the tables beside trials: checkpoints, scores, advice, commands, memory observations.

Plain functions over an open connection; `StudyRecords` decides in which transaction they run.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autosft.studies import rows, tables
from autosft.studies.advice import Advice, Cause
from autosft.studies.values import CheckpointRecord, CheckpointScore, Command, MemoryObservation


def insert_checkpoint(connection: Connection, trial_id: int, checkpoint: CheckpointRecord) -> None:
    """Keep the record of a checkpoint; the same path again replaces it."""
    same = tables.checkpoints.c.path == checkpoint.path
    connection.execute(sa.delete(tables.checkpoints).where(same))
    columns = {"trial_id": trial_id, **rows.checkpoint_columns(checkpoint)}
    connection.execute(sa.insert(tables.checkpoints), columns)


def delete_checkpoints(connection: Connection, paths: Collection[str]) -> None:
    connection.execute(sa.delete(tables.checkpoints).where(tables.checkpoints.c.path.in_(paths)))


def insert_score(connection: Connection, trial_id: int, score: CheckpointScore) -> None:
    """Keep a score; the same checkpoint on the same examples by the same metric again replaces it."""
    table = tables.scores
    columns = {"trial_id": trial_id, **rows.score_columns(score)}
    same = [table.c[name] == columns[name] for name in ("trial_id", "step", "examples", "metric")]
    connection.execute(sa.delete(table).where(*same))
    connection.execute(sa.insert(table), columns)


def read_scores(connection: Connection, study_id: int) -> tuple[CheckpointScore, ...]:
    """Return a study's scores by trial, step and when they were recorded."""
    number = tables.trials.c.number.label("trial")
    query = sa.select(tables.scores, number).join(tables.trials).where(tables.trials.c.study_id == study_id)
    order = (tables.trials.c.number, tables.scores.c.step, tables.scores.c.id)
    return tuple(rows.score_from(row) for row in connection.execute(query.order_by(*order)).mappings())


def insert_advice(connection: Connection, trial_id: int, advice: Advice, *, now: float) -> None:
    """Keep advice; the same cause of the same trial again changes nothing."""
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
    """Return the commands that are not done, oldest first."""
    found = connection.execute(_PENDING_COMMANDS, {"study_id": study_id}).mappings()
    return tuple(rows.command_from(row) for row in found)


_PENDING_COMMANDS = (  # asked once a second
    sa.select(tables.commands)
    .where(tables.commands.c.study_id == sa.bindparam("study_id"), tables.commands.c.done_at.is_(None))
    .order_by(tables.commands.c.id)
)


def finish_command(connection: Connection, command_id: int, *, now: float) -> None:
    this = tables.commands.c.id == command_id
    connection.execute(sa.update(tables.commands).where(this), {"done_at": now})


def insert_observation(connection: Connection, observation: MemoryObservation) -> None:
    """Keep an observation; the same attempt a second time changes nothing."""
    table = tables.memory_observations
    same = [table.c[name] == getattr(observation, name) for name in ("study", "trial", "attempt")]
    if connection.scalar(sa.select(table.c.id).where(*same)) is None:
        connection.execute(sa.insert(table), rows.observation_columns(observation))
