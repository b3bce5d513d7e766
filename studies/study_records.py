"""One study's records: held in memory, written through, every transition one transaction."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from autosft.studies import checkpoints, rows, tables
from autosft.studies.database import in_words
from autosft.studies.lease import acquire
from autosft.studies.projection import Projection
from autosft.studies.sampling import propose
from autosft.studies.space import Parameters, Value, complete, settings_from
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    FailureKind,
    Measurement,
    TrialRecord,
    TrialState,
)
from autosft.studies.values import (
    CheckpointRecord,
    Command,
    Direction,
    Driver,
    LeaseLostError,
    MemoryObservation,
    StudySpec,
)

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

logger = logging.getLogger(__name__)


class StudyRecords:
    """One study's records.

    Reading needs nothing; every method that writes needs the lease (`take_over`) and raises
    LeaseLostError once another process holds it.  A process that is killed anywhere leaves all of a
    transition or nothing of it.  Optuna's tables follow after our commit and are never waited for: what a
    killed process leaves undone there, `recover` does.
    """

    def __init__(
        self, engine: Engine, *, study_id: int, spec: StudySpec, optuna: Callable[[], RDBStorage]
    ) -> None:
        self.spec = spec
        self._optuna = optuna
        self._engine = engine
        self._reading = engine.execution_options(reading=True)
        self.study_id = study_id
        self._driver_id: int | None = None
        self._projection: Projection | None = None  # from recover() on
        self._is_behind = False
        self._has_swept = False
        self._load()

    # Being the only writer

    def take_over(self, driver: Driver, *, now: float) -> None:
        """Become the only writer.

        Raises StudyInUseError that says who and since when, unless the last driver has released the
        study, is a dead process of this host, or has sent no heartbeat for 60 s.
        """
        with in_words(self._engine.url), self._engine.begin() as connection:
            self._driver_id = acquire(
                connection,
                self.study_id,
                driver,
                study=self.spec.name,
                environment=rows.dump(self.spec.environment),
                now=now,
            )
        self._load()  # another driver may have written since this object was made

    def heartbeat(self, *, now: float) -> None:
        """Say that this driver lives, at least every 20 s.  Raises LeaseLostError."""
        with self._transaction() as connection:
            mine = tables.drivers.c.id == self._driver_id
            connection.execute(sa.update(tables.drivers).where(mine).values(heartbeat_at=now))

    def release(self, *, now: float) -> None:
        """Give the lease back; harmless without one."""
        if self._driver_id is None:
            return
        with contextlib.suppress(LeaseLostError), self._transaction() as connection:
            this = tables.studies.c.id == self.study_id
            mine = tables.drivers.c.id == self._driver_id
            connection.execute(sa.update(tables.studies).where(this).values(driver_id=None))
            connection.execute(sa.update(tables.drivers).where(mine).values(ended_at=now))
        self._driver_id = None
        self._projection = None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """Begin a transaction that only the lease's holder can commit.

        The study's row is read under the lock of the transaction (SQLite: BEGIN IMMEDIATE), so that a
        driver that was suspended and replaced cannot write when it wakes up.
        """
        assert self._driver_id is not None, "take_over() comes before writing"
        with in_words(self._engine.url), self._engine.begin() as connection:
            this = tables.studies.c.id == self.study_id
            holder = connection.scalar(sa.select(tables.studies.c.driver_id).where(this).with_for_update())
            if holder != self._driver_id:
                raise LeaseLostError(
                    f"Study {self.spec.name!r} was taken over by another process; this one writes no more.",
                    remedy="Follow it there; or stop it there and run the command again here.",
                )
            yield connection

    # Reading

    def trials(self) -> tuple[TrialRecord, ...]:
        """Return all trials by number."""
        return tuple(self._trials)

    def trial(self, number: int) -> TrialRecord:
        """Return a trial; IndexError where there is none of this number."""
        return self._trials[number]

    def unfinished(self) -> tuple[TrialRecord, ...]:
        """Return the trials that are not over, by number."""
        return tuple(self._trials[number] for number in sorted(self._open))

    def num_finished(self) -> int:
        """Count completed, stopped and infeasible trials."""
        return self._num_finished

    def progress(self, number: int) -> tuple[Measurement, ...]:
        """Return every report of a trial, by attempt and step; read from the database."""
        with self._read() as connection:
            query = _measurements(self.study_id).where(tables.trials.c.number == number)
            return tuple(rows.measurement_from(row) for row in connection.execute(query).mappings())

    def checkpoints(self) -> tuple[CheckpointRecord, ...]:
        """Return the checkpoints that were reported and not removed, by trial and step."""
        return tuple(sorted(self._checkpoints.values(), key=lambda one: (one.trial, one.step)))

    @contextlib.contextmanager
    def _read(self) -> Iterator[Connection]:
        with in_words(self._engine.url), self._reading.begin() as connection:
            yield connection

    def _load(self) -> None:
        """Read the study into memory."""
        with self._read() as connection:
            evaluations: dict[int, dict[int, Measurement]] = {}
            query = _measurements(self.study_id).where(tables.measurements.c.evaluation > 0)
            for row in connection.execute(query).mappings():
                # Of an evaluation that was repeated after a loss, the later attempt's stands.
                evaluations.setdefault(row["trial"], {})[row["evaluation"]] = rows.measurement_from(row)
            own = tables.trials.c.study_id == self.study_id
            query = sa.select(tables.trials).where(own).order_by(tables.trials.c.number)
            self._trials: list[TrialRecord] = []
            self._ids: list[int] = []  # primary keys, by trial number
            for row in connection.execute(query).mappings():
                assert row["number"] == len(self._trials), "trial numbers have no gaps"
                measured = evaluations.get(row["number"], {})
                self._trials.append(rows.trial_from(row, tuple(measured[k] for k in sorted(measured))))
                self._ids.append(row["id"])
            running = sa.select(tables.attempts.c.id, tables.trials.c.number).join(tables.trials)
            running = running.where(own, tables.attempts.c.ended_at.is_(None))
            self._attempt_ids = {number: attempt for attempt, number in connection.execute(running)}
            waiting = sa.select(tables.queue).where(tables.queue.c.study_id == self.study_id)
            self._queue: dict[int, tuple[dict[str, Value], str]] = {}
            for row in connection.execute(waiting.order_by(tables.queue.c.id)).mappings():
                if row["trial"] is None:
                    self._queue[row["id"]] = rows.parameters_from(row), row["origin"]
            kept = sa.select(tables.checkpoints, tables.trials.c.number.label("trial")).join(tables.trials)
            records = [rows.checkpoint_from(row) for row in connection.execute(kept.where(own)).mappings()]
            self._checkpoints = {record.path: record for record in records}
        self._open = {trial.number for trial in self._trials if not trial.state.is_over}
        self._num_finished = sum(trial.state.is_finished for trial in self._trials)

    # Asking

    def enqueue(self, parameters: Parameters, *, origin: str, now: float) -> bool:
        """Have `parameters`, completed from the defaults, asked before the sampler's.

        False, and nothing changes, where the same were asked or enqueued before: going on with a study, a
        second call adds nothing.  Raises UserError for names or values outside the space.
        """
        filled = complete(self.spec.space, parameters)
        known = [dict(trial.parameters) for trial in self._trials] + [one for one, _ in self._queue.values()]
        if filled in known:
            return False
        with self._transaction() as connection:
            columns = {"study_id": self.study_id, "parameters": rows.dump(filled), "origin": origin}
            inserted = connection.execute(sa.insert(tables.queue).values(**columns, enqueued_at=now))
        self._queue[_key(inserted)] = filled, origin
        return True

    def ask(self, *, now: float) -> TrialRecord:
        """Return a new WAITING trial: the first enqueued one, else what the sampler proposes."""
        queued = next(iter(self._queue), None)
        if queued is None:
            maximize = self.spec.direction is Direction.MAXIMIZE
            parameters, origin = (
                propose(
                    self.spec.space,
                    self._trials,
                    maximize=maximize,
                    num_trials=self.spec.num_trials,
                    seed=self.spec.seed,
                ),
                "sampler",
            )
        else:
            parameters, origin = self._queue[queued]
        trial = TrialRecord(
            number=len(self._trials),
            state=TrialState.WAITING,
            settings=settings_from(self.spec.space, parameters, self.spec.fixed),
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
        with self._transaction() as connection:
            columns = {"study_id": self.study_id, "asked_at": now, **rows.trial_columns(trial)}
            inserted = connection.execute(sa.insert(tables.trials).values(columns))
            if queued is not None:
                taken = sa.update(tables.queue).where(tables.queue.c.id == queued)
                connection.execute(taken.values(trial=trial.number))
        self._trials.append(trial)
        self._ids.append(_key(inserted))
        self._open.add(trial.number)
        if queued is not None:
            del self._queue[queued]
        self._follow(lambda projection: projection.create(trial))
        return trial

    # Running

    def begin_attempt(
        self, trial: int, *, plan: ExecutionPlan, device_uuids: tuple[str, ...], now: float
    ) -> int:
        """Set a WAITING or PAUSED trial RUNNING; return its attempt number, from 1."""
        before = self._trials[trial]
        assert before.state in (TrialState.WAITING, TrialState.PAUSED), f"trial {trial} is {before.state}"
        attempt = before.num_attempts + 1
        started_at = now if before.started_at is None else before.started_at
        after = replace(
            before, state=TrialState.RUNNING, plan=plan, num_attempts=attempt, started_at=started_at
        )
        with self._transaction() as connection:
            self._update(connection, before, after)
            columns = {
                "trial_id": self._ids[trial],
                "number": attempt,
                "plan": rows.dump(plan),
                "device_uuids": rows.dump(device_uuids),
                "started_at": now,
            }
            inserted = connection.execute(sa.insert(tables.attempts).values(columns))
        self._attempt_ids[trial] = _key(inserted)
        self._keep(after)
        return attempt

    def record(self, measurement: Measurement, *, now: float) -> bool:
        """Keep a report and the checkpoint that it names; the same report twice counts once.

        False, and nothing changes, where its attempt is not the running one.
        """
        before = self._trials[measurement.trial]
        if not self._is_running(measurement.trial, measurement.attempt):
            return False
        after = self._with(before, measurement) if measurement.is_evaluation else before
        checkpoint = self._checkpoint_of(measurement, now=now)
        attempt_id = self._attempt_ids[measurement.trial]
        columns = rows.measurement_columns(measurement)
        with self._transaction() as connection:
            same = sa.select(tables.measurements.c.id).where(
                tables.measurements.c.attempt_id == attempt_id,
                tables.measurements.c.step == columns["step"],
                tables.measurements.c.evaluation == columns["evaluation"],
            )
            if connection.scalar(same) is not None:
                return True
            values = {"attempt_id": attempt_id, "recorded_at": now, **columns}
            connection.execute(sa.insert(tables.measurements).values(values))
            self._update(connection, before, after)
            if checkpoint is not None:
                self._insert_checkpoint(connection, checkpoint)
        self._keep(after)
        if checkpoint is not None:
            self._checkpoints[checkpoint.path] = checkpoint
        if measurement.is_evaluation:
            self._follow(lambda projection: projection.measure(measurement))
        return True

    def end_attempt(
        self, end: AttemptEnd, state: TrialState, *, value: float | None = None, now: float
    ) -> bool:
        """End the running attempt and set its trial's next state; False where the attempt is over.

        `state` is what the tuning loop decided: over (COMPLETED, STOPPED, INFEASIBLE, FAILED), PAUSED, or
        WAITING to be tried again.  `value` is the study's metric: the best evaluation's where it is not
        given, and the worst possible one where the loss became non-finite.
        """
        assert state is not TrialState.RUNNING
        before = self._trials[end.trial]
        if not self._is_running(end.trial, end.attempt):
            return False
        after = replace(
            before,
            state=state,
            failure=end.failure,
            message=end.message,
            finished_at=now if state.is_over else None,
        )
        if value is not None:
            after = replace(after, value=value)
        elif end.failure is FailureKind.NON_FINITE_LOSS and state.is_over:
            after = replace(after, value=self._worst, best_step=None, best_checkpoint=None)
        assert state is not TrialState.COMPLETED or after.value is not None, (
            f"trial {end.trial} completed without an evaluation that has {self.spec.metric}"
        )
        with self._transaction() as connection:
            this = tables.attempts.c.id == self._attempt_ids[end.trial]
            columns = {
                "ended_at": now,
                "outcome": _outcome(end),
                "message": end.message,
                "log_path": end.log_path,
                "peak_allocated_bytes": end.peak_allocated_bytes,
                "peak_reserved_bytes": end.peak_reserved_bytes,
                "duration_s": end.duration_s,
                "eval_fingerprint": end.eval_fingerprint,
            }
            connection.execute(sa.update(tables.attempts).where(this).values(columns))
            self._update(connection, before, after)
        del self._attempt_ids[end.trial]
        self._keep(after)
        self._follow(lambda projection: projection.finish(after))
        return True

    def set_state(self, trial: int, state: TrialState, *, message: str = "", now: float) -> None:
        """Change the state of a trial that is not running.

        For what happens without an attempt: INFEASIBLE when no plan is left, STOPPED or PAUSED by the
        user, PAUSED back to WAITING.
        """
        before = self._trials[trial]
        assert not before.state.is_over, f"trial {trial} is {before.state}"
        assert before.state is not TrialState.RUNNING
        assert state not in (TrialState.RUNNING, TrialState.COMPLETED)
        after = replace(before, state=state, message=message, finished_at=now if state.is_over else None)
        with self._transaction() as connection:
            self._update(connection, before, after)
        self._keep(after)
        self._follow(lambda projection: projection.finish(after))

    def recover(self, *, now: float) -> tuple[int, ...]:
        """Abandon the attempts that a dead driver left: RUNNING trials wait again; return their numbers.

        Also brings Optuna's tables up to date; trials there that we have no row of are closed as FAIL.
        """
        lost = tuple(sorted(self._attempt_ids))
        after = [replace(self._trials[number], state=TrialState.WAITING) for number in lost]
        with self._transaction() as connection:
            for trial in after:
                self._update(connection, self._trials[trial.number], trial)
                this = tables.attempts.c.id == self._attempt_ids[trial.number]
                abandoned = {"ended_at": now, "outcome": "abandoned"}
                connection.execute(sa.update(tables.attempts).where(this).values(abandoned))
        self._attempt_ids.clear()
        for trial in after:
            self._keep(trial)
        self._project()
        return lost

    # Optuna's tables

    def _project(self) -> None:
        """Bring Optuna's tables up to date with everything."""
        if self._projection is None:
            self._projection = Projection(
                self._optuna(),
                study=self.spec.name,
                metric=self.spec.metric,
                maximize=self.spec.direction is Direction.MAXIMIZE,
                space=self.spec.space,
            )
        attributes = {"metric": self.spec.metric, "model": self.spec.model, "data": self.spec.data}
        self._projection.synchronise(self._trials, attributes=attributes)
        self._is_behind = False

    def _follow(self, step: Callable[[Projection], None]) -> None:
        """Let Optuna's tables follow a commit of ours; a study never fails because they cannot.

        What is missed, while somebody else keeps them locked, is made up for at the next step.
        """
        if self._projection is None:
            return
        from optuna.exceptions import StorageInternalError

        try:
            if self._is_behind:
                self._project()
            else:
                step(self._projection)
        except (StorageInternalError, DBAPIError) as error:
            self._is_behind = True
            logger.warning("Optuna's tables are behind, the study goes on: %s", error)

    # Changing

    @property
    def _worst(self) -> float:
        return math.inf if self.spec.direction is Direction.MINIMIZE else -math.inf

    def _is_running(self, trial: int, attempt: int) -> bool:
        known = self._trials[trial]
        return known.state is TrialState.RUNNING and known.num_attempts == attempt

    def _with(self, trial: TrialRecord, measurement: Measurement) -> TrialRecord:
        """Add an evaluation to a trial, whose value is that of its best one."""
        others = [one for one in trial.measurements if one.evaluation != measurement.evaluation]
        measured = tuple(sorted([*others, measurement], key=lambda one: one.step))
        scored = [(self._score(one), one) for one in measured if one.metric(self.spec.metric) is not None]
        if not scored:
            return replace(trial, measurements=measured)
        score, best = min(scored, key=lambda pair: pair[0])
        value = self._worst if math.isinf(score) else best.metric(self.spec.metric)
        return replace(
            trial, measurements=measured, value=value, best_step=best.step, best_checkpoint=best.checkpoint
        )

    def _score(self, measurement: Measurement) -> float:
        """Return the metric so that smaller is better and NaN the worst."""
        value = measurement.metric(self.spec.metric)
        assert value is not None
        if math.isnan(value):
            return math.inf
        return value if self.spec.direction is Direction.MINIMIZE else -value

    def _update(self, connection: Connection, before: TrialRecord, after: TrialRecord) -> None:
        if columns := rows.changed_columns(before, after):
            this = tables.trials.c.id == self._ids[after.number]
            connection.execute(sa.update(tables.trials).where(this).values(columns))

    def _keep(self, trial: TrialRecord) -> None:
        """Take over a trial that has been committed."""
        self._num_finished += trial.state.is_finished - self._trials[trial.number].state.is_finished
        self._trials[trial.number] = trial
        if trial.state.is_over:
            self._open.discard(trial.number)

    # Checkpoints

    def add_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        """Keep the record of a checkpoint that is in place; the same path again replaces it."""
        with self._transaction() as connection:
            self._insert_checkpoint(connection, checkpoint)
        self._checkpoints[checkpoint.path] = checkpoint

    def _insert_checkpoint(self, connection: Connection, checkpoint: CheckpointRecord) -> None:
        same = tables.checkpoints.c.path == checkpoint.path
        connection.execute(sa.delete(tables.checkpoints).where(same))
        columns = {"trial_id": self._ids[checkpoint.trial], **rows.checkpoint_columns(checkpoint)}
        connection.execute(sa.insert(tables.checkpoints).values(columns))

    def _checkpoint_of(self, measurement: Measurement, *, now: float) -> CheckpointRecord | None:
        if measurement.checkpoint is None:
            return None
        contents = checkpoints.inspect(Path(measurement.checkpoint))
        return CheckpointRecord(
            trial=measurement.trial,
            attempt=measurement.attempt,
            step=measurement.step,
            evaluation=measurement.evaluation,
            value=measurement.metric(self.spec.metric),
            path=measurement.checkpoint,
            num_bytes=contents.num_bytes,
            sha256=contents.sha256,
            has_resume_state=contents.has_resume_state,
            created_at=now,
        )

    def remove_checkpoints(self, paths: Collection[str]) -> None:
        """Forget checkpoints; before their folders are deleted, so that no record points at nothing."""
        with self._transaction() as connection:
            gone = tables.checkpoints.c.path.in_(paths)
            connection.execute(sa.delete(tables.checkpoints).where(gone))
        for path in paths:
            self._checkpoints.pop(path, None)

    def tidy_checkpoints(self, study_dir: Path, *, keep_best: int) -> tuple[str, ...]:
        """Delete the checkpoints that nobody needs any more (`checkpoints.to_remove`); return their paths.

        The first time, also what killed processes have left in the study's folder.
        """
        maximize = self.spec.direction is Direction.MAXIMIZE
        doomed = checkpoints.to_remove(
            self._checkpoints.values(), self._trials, keep_best=keep_best, maximize=maximize
        )
        paths = tuple(one.path for one in doomed)
        if paths:
            self.remove_checkpoints(paths)
        for path in paths:
            checkpoints.remove(Path(path))
        if not self._has_swept:
            for folder in checkpoints.strays(study_dir, known=self._checkpoints, running=self._attempt_ids):
                checkpoints.remove(folder)
            self._has_swept = True
        return paths

    # Commands of users, and what was learned

    def pending_commands(self) -> tuple[Command, ...]:
        """Return the commands of users that are not done, oldest first; read from the database."""
        own = tables.commands.c.study_id == self.study_id
        query = sa.select(tables.commands).where(own, tables.commands.c.done_at.is_(None))
        with self._read() as connection:
            found = connection.execute(query.order_by(tables.commands.c.id)).mappings()
            return tuple(rows.command_from(row) for row in found)

    def finish_command(self, command_id: int, *, now: float) -> None:
        """Mark a command done."""
        with self._transaction() as connection:
            this = tables.commands.c.id == command_id
            connection.execute(sa.update(tables.commands).where(this).values(done_at=now))

    def add_memory_observation(
        self,
        *,
        trial: int,
        attempt: int,
        plan: ExecutionPlan,
        allocated_bytes: int | None,
        reserved_bytes: int | None,
        out_of_memory: bool = False,
        now: float,
    ) -> None:
        """Keep a measured peak for the memory model; the same attempt a second time changes nothing."""
        observation = MemoryObservation(
            study=self.spec.name,
            trial=trial,
            attempt=attempt,
            model_fingerprint=self.spec.model_fingerprint,
            device_name=plan.device_name,
            settings=self._trials[trial].settings,
            pinned=self.spec.pinned,
            plan=plan,
            measured_allocated_bytes=allocated_bytes,
            measured_reserved_bytes=reserved_bytes,
            out_of_memory=out_of_memory,
            recorded_at=now,
        )
        table = tables.memory_observations
        same = [table.c[name] == getattr(observation, name) for name in ("study", "trial", "attempt")]
        with self._transaction() as connection:
            if connection.scalar(sa.select(table.c.id).where(*same)) is None:
                connection.execute(sa.insert(table).values(rows.observation_columns(observation)))


def _measurements(study_id: int) -> sa.Select[tuple[object, ...]]:
    """Return the query for a study's reports, by trial, attempt and step."""
    numbers = tables.trials.c.number.label("trial"), tables.attempts.c.number.label("attempt")
    joined = tables.measurements.join(tables.attempts).join(tables.trials)
    query = sa.select(tables.measurements, *numbers).select_from(joined)
    order = (tables.trials.c.number, tables.attempts.c.number, tables.measurements.c.step)
    return query.where(tables.trials.c.study_id == study_id).order_by(*order)


def _key(inserted: sa.CursorResult[tuple[object, ...]]) -> int:
    keys = inserted.inserted_primary_key
    assert keys is not None
    return int(keys[0])


def _outcome(end: AttemptEnd) -> str:
    if end.completed:
        return "completed"
    cause = end.failure or end.stopped
    assert cause is not None, "an attempt that did not complete was stopped or failed"
    return str(cause.value)
