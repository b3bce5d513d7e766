"""One study's records: kept in memory, written through, each transition in one transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.engine import Connection, Engine

from autosft.studies.files import checkpoints, remote
from autosft.studies.files.checkpoints import may_be_removed
from autosft.studies.search.sampling import propose
from autosft.studies.search.space import Parameters, complete, settings_from
from autosft.studies.store import rows, statements
from autosft.studies.store.driver_lease import Lease
from autosft.studies.store.optuna_projection import Projection
from autosft.studies.store.study_annotations import StudyAnnotations
from autosft.studies.store.study_state import (
    load_state,
    new_trial,
    with_end,
    with_evaluation,
)
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    Measurement,
    TrainingSettings,
    TrialRecord,
    TrialState,
)
from autosft.studies.values import (
    AttemptRecord,
    CheckpointRecord,
    Direction,
    Driver,
    StudySpec,
)

if TYPE_CHECKING:
    from optuna.storages import RDBStorage


#: How long Optuna's tables may lag behind ours while a study runs, in seconds.
PROJECT_EVERY_S = 1.0


class StudyRecords(StudyAnnotations):
    """One study's records.

    Reading needs no lease.  Every method that writes needs it (`take_over`), unless stated otherwise, and
    raises LeaseLostError once another process holds it.  A process killed at any point leaves a transition
    either complete or absent.  Optuna's tables are updated after our commit and never waited for; `recover`
    completes what a killed process left undone there.
    """

    def __init__(
        self, engine: Engine, *, study_id: int, spec: StudySpec, optuna: Callable[[], RDBStorage]
    ) -> None:
        self.spec = spec
        self._optuna = optuna
        self._engine = engine
        self._reading = engine.execution_options(reading=True)
        self.study_id = study_id
        self._maximize = spec.direction is Direction.MAXIMIZE
        self._lease = Lease(engine, study_id=study_id, study=spec.name)
        self._projection: Projection | None = None  # from recover() on
        self._is_projected_later = False
        self._projected_at = float("-inf")
        self._has_swept = False
        self._load()

    # Becoming the only writer

    def take_over(self, driver: Driver, *, now: float) -> None:
        """Become the only writer.

        Raises StudyInUseError, with who and since when, unless the last driver has released the study, is a
        dead process of this host, or has sent no heartbeat for 60 s.
        """
        self._lease.take_over(driver, environment=rows.dump(self.spec.environment), now=now)
        self._load()  # another driver may have written since this object was created

    def heartbeat(self, *, now: float) -> None:
        """Send a heartbeat; call it at least every 20 s.  Cheap however often.  Raises LeaseLostError."""
        self._lease.heartbeat(now=now)

    def release(self, *, now: float) -> None:
        """Release the lease; does nothing without one."""
        if self._lease.is_held():
            self.project(now=now, at_once=True)
        self._lease.release(now=now)
        self._projection = None

    # Reading

    def trials(self) -> tuple[TrialRecord, ...]:
        """Return all trials by number."""
        return tuple(self._state.trials)

    def trial(self, number: int) -> TrialRecord:
        """Return a trial.  Raises IndexError if there is none of this number."""
        return self._state.trials[number]

    def unfinished(self) -> tuple[TrialRecord, ...]:
        """Return the trials that are not over, by number."""
        return tuple(self._state.trials[number] for number in sorted(self._state.unfinished))

    def num_finished(self) -> int:
        """Return the number of completed, stopped and infeasible trials."""
        return self._state.num_finished

    def progress(self, number: int) -> tuple[Measurement, ...]:
        """Return all reports of a trial, by attempt and step; reads the database."""
        with self._read() as connection:
            return statements.read_measurements(connection, self.study_id, number)

    def attempts(self) -> tuple[AttemptRecord, ...]:
        """Return all attempts by trial and number; reads the database."""
        with self._read() as connection:
            return statements.read_attempts(connection, self.study_id)

    def checkpoints(self) -> tuple[CheckpointRecord, ...]:
        """Return the reported checkpoints that were not removed, by trial and step."""
        return tuple(
            sorted(
                self._state.checkpoints.values(), key=lambda checkpoint: (checkpoint.trial, checkpoint.step)
            )
        )

    def _load(self) -> None:
        with self._read() as connection:
            self._state = load_state(connection, self.study_id)

    # Asking

    def enqueue(self, parameters: Parameters, *, origin: str, now: float) -> bool:
        """Queue `parameters`, completed from the defaults, to be tried before the sampler's.

        Returns False, changing nothing, if the same parameters were tried or queued before, so that resuming
        a study adds nothing.  Raises UserError for names or values outside the search space.
        """
        filled = complete(self.spec.space, parameters)
        known = [dict(trial.parameters) for trial in self._state.trials] + [
            parameters for parameters, _ in self._state.queue.values()
        ]
        if filled in known:
            return False
        with self._lease.transaction() as connection:
            key = statements.insert_queued(connection, self.study_id, filled, origin=origin, now=now)
        self._state.queue[key] = filled, origin
        return True

    def has_queued(self) -> bool:
        """Whether `ask` returns a queued trial."""
        return bool(self._state.queue)

    def ask(self, *, now: float, proposed: Parameters | None = None) -> TrialRecord:
        """Return a new WAITING trial: the first queued one, else `proposed`, else the sampler's proposal."""
        queued = next(iter(self._state.queue), None)
        if queued is not None:
            parameters, origin = self._state.queue[queued]
        elif proposed is not None:
            origin, parameters = "sampler", complete(self.spec.space, proposed)
        else:
            origin = "sampler"
            parameters = propose(
                self.spec.space,
                self._state.trials,
                maximize=self._maximize,
                num_trials=self.spec.num_trials,
                seed=self.spec.seed,
            )
        settings = settings_from(self.spec.space, parameters, self.spec.fixed.of(origin))
        trial = new_trial(len(self._state.trials), settings, parameters, origin=origin)
        with self._lease.transaction() as connection:
            key = statements.insert_trial(connection, self.study_id, trial, queued=queued, now=now)
        self._state.add(trial, key)
        if queued is not None:
            del self._state.queue[queued]
        self._follow(trial.number)
        return trial

    # Running

    def begin_attempt(
        self, trial: int, *, plan: ExecutionPlan, device_uuids: tuple[str, ...], now: float
    ) -> int:
        """Set a WAITING or PAUSED trial to RUNNING; return its attempt number, from 1."""
        before = self._state.trials[trial]
        assert before.state in (TrialState.WAITING, TrialState.PAUSED), f"trial {trial} is {before.state}"
        attempt = before.num_attempts + 1
        started_at = now if before.started_at is None else before.started_at
        after = replace(
            before, state=TrialState.RUNNING, plan=plan, num_attempts=attempt, started_at=started_at
        )
        with self._lease.transaction() as connection:
            self._update(connection, before, after)
            key = statements.insert_attempt(
                connection, self._state.ids[trial], attempt, plan=plan, device_uuids=device_uuids, now=now
            )
        self._state.attempt_ids[trial] = key
        self._state.keep(after)
        return attempt

    def record(self, measurement: Measurement, *, now: float) -> bool:
        """Store a report and the checkpoint that it names; a repeated report counts once.

        Returns False, changing nothing, if its attempt is not the running one.
        """
        before = self._state.trials[measurement.trial]
        if not self._state.is_running(measurement.trial, measurement.attempt):
            return False
        after = (
            with_evaluation(before, measurement, metric=self.spec.metric, maximize=self._maximize)
            if measurement.is_evaluation
            else before
        )
        checkpoint = checkpoints.reported(measurement, metric=self.spec.metric, now=now)
        attempt_id = self._state.attempt_ids[measurement.trial]
        with self._lease.transaction() as connection:
            if not statements.insert_measurement(connection, attempt_id, measurement, now=now):
                return True
            self._update(connection, before, after)
            if checkpoint is not None:
                statements.insert_checkpoint(connection, self._state.ids[checkpoint.trial], checkpoint)
        self._state.keep(after)
        if checkpoint is not None:
            self._state.checkpoints[checkpoint.path] = checkpoint
        if measurement.is_evaluation:
            self._follow(measurement.trial)
        return True

    def end_attempt(
        self, end: AttemptEnd, state: TrialState, *, value: float | None = None, now: float
    ) -> bool:
        """End the running attempt and set its trial's next state; return False if the attempt is over.

        `state` is what the tuning loop decided: over (COMPLETED, STOPPED, INFEASIBLE, FAILED), PAUSED, or
        WAITING for a retry.  `value` is the study's metric; by default that of the best evaluation, or the
        worst possible value if the loss became non-finite.
        """
        assert state is not TrialState.RUNNING
        before = self._state.trials[end.trial]
        if not self._state.is_running(end.trial, end.attempt):
            return False
        after = with_end(before, end, state, value=value, maximize=self._maximize, now=now)
        assert state is not TrialState.COMPLETED or after.value is not None, (
            f"trial {end.trial} completed without an evaluation that has {self.spec.metric}"
        )
        with self._lease.transaction() as connection:
            statements.end_attempt(connection, self._state.attempt_ids[end.trial], end, now=now)
            self._update(connection, before, after)
        del self._state.attempt_ids[end.trial]
        self._state.keep(after)
        self._follow(after.number)
        return True

    def set_state(self, trial: int, state: TrialState, *, message: str = "", now: float) -> None:
        """Change the state of a trial that is not running.

        For transitions without an attempt: INFEASIBLE if no plan is left, STOPPED or PAUSED by the user,
        PAUSED back to WAITING.
        """
        before = self._state.trials[trial]
        assert not before.state.is_over, f"trial {trial} is {before.state}"
        assert before.state is not TrialState.RUNNING
        assert state not in (TrialState.RUNNING, TrialState.COMPLETED)
        after = replace(before, state=state, message=message, finished_at=now if state.is_over else None)
        with self._lease.transaction() as connection:
            self._update(connection, before, after)
        self._state.keep(after)
        self._follow(after.number)

    def take_up_again(self, trial: int, *, now: float) -> None:
        """Have a FAILED trial wait again, with what it has measured; before `recover`."""
        before = self._state.trials[trial]
        assert before.state is TrialState.FAILED, f"trial {trial} is {before.state}"
        assert self._projection is None, "Optuna's tables learn of it as a whole"
        after = replace(before, state=TrialState.WAITING, finished_at=None)
        with self._lease.transaction() as connection:
            self._update(connection, before, after)
        self._state.keep(after)

    def change_settings(self, trial: int, settings: TrainingSettings, *, message: str, now: float) -> None:
        """Change the settings of a trial that is not running; `message` records why.

        For settings that ran out of memory before anything was measured.  Its parameters remain those that
        the sampler proposed: the trial's result is what proposing them leads to on this machine.
        """
        before = self._state.trials[trial]
        assert not before.state.is_over, f"trial {trial} is {before.state}"
        assert before.state is not TrialState.RUNNING
        assert not before.measurements, "would mix an earlier result with that of other settings"
        after = replace(before, settings=settings, message=message)
        with self._lease.transaction() as connection:
            self._update(connection, before, after)
        self._state.keep(after)

    def recover(self, *, now: float) -> tuple[int, ...]:
        """Abandon the attempts of a dead driver, whose RUNNING trials wait again; return their numbers.

        Also brings Optuna's tables up to date; trials there without a row of ours are closed as FAIL.
        """
        lost = tuple(sorted(self._state.attempt_ids))
        after = [replace(self._state.trials[number], state=TrialState.WAITING) for number in lost]
        with self._lease.transaction() as connection:
            for trial in after:
                self._update(connection, self._state.trials[trial.number], trial)
            statements.abandon_attempts(connection, self._state.attempt_ids.values(), now=now)
        self._state.attempt_ids.clear()
        for trial in after:
            self._state.keep(trial)
        self._project()
        return lost

    # Optuna's tables

    def _project(self) -> None:
        """Bring Optuna's tables up to date with all trials."""
        if self._projection is None:
            self._projection = Projection(
                self._optuna(),
                study=self.spec.name,
                metric=self.spec.metric,
                maximize=self._maximize,
                space=self.spec.space,
                attributes={"model": self.spec.model, "data": self.spec.data, **self._untuned_attribute()},
                key=self.study_id,
            )
        self._projection.synchronise(self._state.trials)

    def _untuned_attribute(self) -> dict[str, float]:
        untuned = self.untuned()
        value = None if untuned is None else untuned.metric(self.spec.metric)
        return {} if value is None else {f"untuned {self.spec.metric}": value}

    def show_in_dashboard(self, name: str, text: str) -> None:
        """Show a sentence about the study in Optuna's dashboard, unless it is empty."""
        if self._projection is not None and text:
            self._projection.describe(name, text)

    def _follow(self, trial: int) -> None:
        """Update Optuna's tables after one of our commits; a study never fails because that fails."""
        if self._projection is not None:
            self._projection.note(trial)
            if not self._is_projected_later:
                self._projection.follow(self._state.trials)

    def project_later(self) -> None:
        """From now on, update Optuna's tables only when `project` is called, and at the end."""
        self._is_projected_later = True

    def project(self, *, now: float, at_once: bool = False) -> None:
        """Update Optuna's tables, unless `at_once` at most once every PROJECT_EVERY_S.

        All changes of a short trial become one transaction: Optuna's own way of writing costs as much as all
        of ours together.
        """
        is_due = at_once or not 0 <= now - self._projected_at < PROJECT_EVERY_S
        if self._projection is not None and is_due:
            with self._lease.transaction():  # says what it waits for; Optuna retries without a word
                pass
            self._projection.follow(self._state.trials)
            self._projected_at = now

    def _update(self, connection: Connection, before: TrialRecord, after: TrialRecord) -> None:
        statements.update_trial(connection, self._state.ids[after.number], before, after)

    # Checkpoints

    def remove_checkpoints(self, paths: Collection[str]) -> None:
        """Forget checkpoints; call it before deleting their folders, so that no record points at nothing."""
        with self._lease.transaction() as connection:
            statements.delete_checkpoints(connection, paths)
        for path in paths:
            self._state.checkpoints.pop(path, None)

    def tidy_checkpoints(self, study_dir: Path, *, keep_best: int) -> tuple[str, ...]:
        """Delete the checkpoints that are no longer needed (`checkpoints.to_remove`); return their paths.

        The first call also deletes what killed processes have left in the study's folder.
        """
        doomed = checkpoints.to_remove(
            self._state.checkpoints.values(), self._state.trials, keep_best=keep_best, maximize=self._maximize
        )
        paths = tuple(checkpoint.path for checkpoint in doomed)
        if paths:
            self.remove_checkpoints(paths)
        for path in paths:
            if not remote.is_url(path) and may_be_removed(Path(path), study_dir):
                with contextlib.suppress(OSError):  # of a disk that is read-only now: swept by a later run
                    checkpoints.remove(Path(path))
        remote.discard(path for path in paths if remote.is_url(path))
        if not self._has_swept:
            for folder in checkpoints.strays(
                study_dir, known=self._state.checkpoints, running=self._state.attempt_ids
            ):
                with contextlib.suppress(OSError):
                    checkpoints.remove(folder)
            if self.spec.store_url:
                remote.sweep(
                    self.spec.store_url, known=self._state.checkpoints, running=self._state.attempt_ids
                )
            self._has_swept = True
        return paths
