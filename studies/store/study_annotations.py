"""What stands beside a study's trials: scores, advice, user commands, and what attempts measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from sqlalchemy.engine import Connection, Engine

from autosft.studies.advice import Advice
from autosft.studies.store import statements
from autosft.studies.store.database import begin, readable_errors, readable_rows
from autosft.studies.store.driver_lease import Lease
from autosft.studies.store.study_state import StudyState
from autosft.studies.trial import ExecutionPlan
from autosft.studies.values import CheckpointScore, Command, MemoryObservation, StudySpec, UntunedScore


class StudyAnnotations:
    """What a study's records hold beside its trials, none of which changes the state of a trial."""

    spec: StudySpec
    study_id: int
    _engine: Engine
    _reading: Engine  # the same, for transactions that only read
    _lease: Lease
    _state: StudyState

    @contextlib.contextmanager
    def _read(self) -> Iterator[Connection]:
        url = self._engine.url
        with readable_errors(url), begin(self._reading) as connection, readable_rows(url):
            yield connection

    def add_scores(self, scores: Iterable[CheckpointScore]) -> None:
        """Store scores of checkpoints, replacing earlier ones on the same examples by the same metric.

        Needs no lease, since scores do not affect the course of the study.
        """
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            for score in scores:
                statements.insert_score(connection, self._state.ids[score.trial], score)

    def scores(self) -> tuple[CheckpointScore, ...]:
        """Return the scores of checkpoints on examples other than the study's own, by trial and step."""
        with self._read() as connection:
            return statements.read_scores(connection, self.study_id)

    def keep_untuned(self, score: UntunedScore) -> bool:
        """Store the untuned model's score; return False, changing nothing, if there is one."""
        with self._lease.transaction() as connection:
            return statements.insert_untuned(connection, self.study_id, score)

    def untuned(self) -> UntunedScore | None:
        """Return the untuned model's score; None if it has not been scored yet.

        Studies of earlier versions have none until they are resumed.  Reads the database.
        """
        with self._read() as connection:
            return statements.read_untuned(connection, self.study_id)

    def add_advice(self, advice: Advice, *, now: float) -> None:
        """Store advice on a trial, once per cause; needs no lease."""
        with readable_errors(self._engine.url), begin(self._engine) as connection:
            statements.insert_advice(connection, self._state.ids[advice.trial], advice, now=now)

    def advice(self) -> tuple[Advice, ...]:
        """Return the advice that was given, oldest first; reads the database."""
        with self._read() as connection:
            return statements.read_advice(connection, self.study_id)

    def pending_commands(self) -> tuple[Command, ...]:
        """Return the pending user commands, oldest first; reads the database."""
        with self._read() as connection:
            return statements.read_pending_commands(connection, self.study_id)

    def finish_command(self, command_id: int, *, now: float) -> None:
        """Mark a command as done."""
        with self._lease.transaction() as connection:
            statements.finish_command(connection, command_id, now=now)

    def add_memory_observation(
        self,
        *,
        trial: int,
        attempt: int,
        plan: ExecutionPlan,
        allocated_bytes: int | None,
        reserved_bytes: int | None,
        out_of_memory: bool = False,
        tokens_per_s: float | None = None,
        now: float,
    ) -> None:
        """Store what an attempt measured, to calibrate the models; repeated calls change nothing."""
        observation = MemoryObservation(
            study=self.spec.name,
            trial=trial,
            attempt=attempt,
            model_fingerprint=self.spec.model_fingerprint,
            device_name=plan.device_name,
            settings=self._state.trials[trial].settings,
            pinned=self.spec.pinned,
            plan=plan,
            measured_allocated_bytes=allocated_bytes,
            measured_reserved_bytes=reserved_bytes,
            out_of_memory=out_of_memory,
            recorded_at=now,
            measured_tokens_per_s=tokens_per_s,
        )
        with self._lease.transaction() as connection:
            statements.insert_observation(connection, observation)
