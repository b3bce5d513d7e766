"""One study in memory: read from the database once, and updated after every commit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from autosft.studies.search.dimensions import Value
from autosft.studies.store import rows, tables
from autosft.studies.trial import (
    AttemptEnd,
    FailureKind,
    Measurement,
    StopReason,
    TrainingSettings,
    TrialRecord,
    TrialState,
)
from autosft.studies.values import CheckpointRecord


@dataclass(slots=True)
class StudyState:
    """The database's contents of one study; the cost of a change does not grow with the study."""

    trials: list[TrialRecord] = field(default_factory=list)  # by number
    ids: list[int] = field(default_factory=list)  # primary keys, by number
    attempt_ids: dict[int, int] = field(default_factory=dict)  # of the running attempts, by trial
    queue: dict[int, tuple[dict[str, Value], str]] = field(default_factory=dict)  # parameters and origin
    checkpoints: dict[str, CheckpointRecord] = field(default_factory=dict)  # by path
    unfinished: set[int] = field(default_factory=set)
    num_finished: int = 0

    def add(self, trial: TrialRecord, key: int) -> None:
        """Add a trial that was inserted into the database."""
        assert trial.number == len(self.trials), "trial numbers have no gaps"
        self.trials.append(trial)
        self.ids.append(key)
        self.num_finished += trial.state.is_finished
        if not trial.state.is_over:
            self.unfinished.add(trial.number)

    def keep(self, trial: TrialRecord) -> None:
        """Replace a trial that was changed in the database."""
        self.num_finished += trial.state.is_finished - self.trials[trial.number].state.is_finished
        self.trials[trial.number] = trial
        if trial.state.is_over:
            self.unfinished.discard(trial.number)
        else:
            self.unfinished.add(trial.number)

    def is_running(self, trial: int, attempt: int) -> bool:
        known = self.trials[trial]
        return known.state is TrialState.RUNNING and known.num_attempts == attempt


def load_state(connection: Connection, study_id: int) -> StudyState:
    """Read a study from the database."""
    state = StudyState()
    evaluations: dict[int, dict[int, Measurement]] = {}
    for row in connection.execute(
        measurements_query(study_id).where(tables.measurements.c.evaluation > 0)
    ).mappings():
        # If an evaluation was repeated after a lost worker, the later attempt's counts.
        evaluations.setdefault(row["trial"], {})[row["evaluation"]] = rows.measurement_from(row)
    own = tables.trials.c.study_id == study_id
    number = tables.trials.c.number
    for row in connection.execute(sa.select(tables.trials).where(own).order_by(number)).mappings():
        measured = evaluations.get(row["number"], {}).values()
        state.add(rows.trial_from(row, by_step(measured)), row["id"])
    running = sa.select(tables.attempts.c.id, number).join(tables.trials)
    for key, trial in connection.execute(running.where(own, tables.attempts.c.ended_at.is_(None))):
        state.attempt_ids[trial] = key
    waiting = sa.select(tables.queue).where(
        tables.queue.c.study_id == study_id, tables.queue.c.trial.is_(None)
    )
    for row in connection.execute(waiting.order_by(tables.queue.c.id)).mappings():
        state.queue[row["id"]] = rows.parameters_from(row), row["origin"]
    kept = sa.select(tables.checkpoints, number.label("trial")).join(tables.trials).where(own)
    for row in connection.execute(kept).mappings():
        state.checkpoints[row["path"]] = rows.checkpoint_from(row)
    return state


def measurements_query(study_id: int) -> sa.Select[tuple[object, ...]]:
    """Return the query for a study's reports, by trial, attempt and step."""
    numbers = tables.trials.c.number.label("trial"), tables.attempts.c.number.label("attempt")
    joined = tables.measurements.join(tables.attempts).join(tables.trials)
    query = sa.select(tables.measurements, *numbers).select_from(joined)
    order = (tables.trials.c.number, tables.attempts.c.number, tables.measurements.c.step)
    return query.where(tables.trials.c.study_id == study_id).order_by(*order)


def new_trial(
    number: int, settings: TrainingSettings, parameters: Mapping[str, Value], *, origin: str
) -> TrialRecord:
    """Return a trial that has just been asked."""
    return TrialRecord(
        number=number,
        state=TrialState.WAITING,
        settings=settings,
        parameters=tuple(parameters.items()),
        origin=origin,
        plan=None,
        num_attempts=0,
        value=None,
        best_step=None,
        best_checkpoint=None,
        failure=None,
        message="",
        measurements=(),
        started_at=None,
        finished_at=None,
    )


def by_step(measurements: Iterable[Measurement]) -> tuple[Measurement, ...]:
    return tuple(sorted(measurements, key=lambda measurement: measurement.step))


def with_evaluation(
    trial: TrialRecord, measurement: Measurement, *, metric: str, maximize: bool
) -> TrialRecord:
    """Add an evaluation to a trial and update its value, that of its best evaluation; NaN is the worst."""
    others = [earlier for earlier in trial.measurements if earlier.evaluation != measurement.evaluation]
    measured = by_step([*others, measurement])
    scored = [
        (value, measurement) for measurement in measured if (value := measurement.metric(metric)) is not None
    ]
    if not scored:
        return replace(trial, measurements=measured)

    def badness(pair: tuple[float, Measurement]) -> float:
        value = pair[0]
        return math.inf if math.isnan(value) else -value if maximize else value

    value, best = min(scored, key=badness)
    return replace(
        trial,
        measurements=measured,
        value=worst_value(maximize=maximize) if math.isnan(value) else value,
        best_step=best.step,
        best_checkpoint=best.checkpoint,
    )


def with_end(
    trial: TrialRecord, end: AttemptEnd, state: TrialState, *, value: float | None, maximize: bool, now: float
) -> TrialRecord:
    """Set the state of a trial whose attempt has ended; the message says why, unless it was pruned.

    Its value is the given one, else the worst possible one if the loss became non-finite, else that of its
    best evaluation.
    """
    message = end.message
    if state is TrialState.STOPPED and end.stopped not in (None, StopReason.PRUNED) and not message:
        message = end.stopped.value
    after = replace(
        trial,
        state=state,
        failure=end.failure,
        message=message,
        finished_at=now if state.is_over else None,
    )
    if value is not None:
        return replace(after, value=value)
    if end.failure is FailureKind.NON_FINITE_LOSS and state.is_over:
        return replace(after, value=worst_value(maximize=maximize), best_step=None, best_checkpoint=None)
    return after


def worst_value(*, maximize: bool) -> float:
    return -math.inf if maximize else math.inf
