"""A study ends with exactly the trials that were asked for, whatever happens in between.

A state machine over generated interleavings of faults, users' commands, devices that join and leave, other
programs in the way, reports that come late or twice, and drivers that die anywhere, before and behind each
commit of each transition; on the fake runner's virtual clock over real records in SQLite.  The loop runs in a
thread in lockstep with it (`lives`), so that between any two rounds what is recorded can be looked at, and
things can happen (`world`).  What each commit leaves is looked at, too (`whole`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from autosft.studies.store import records as records_module
from autosft.studies.store import tables
from autosft.studies.store.records import CommandKind, Records, open_records
from autosft.studies.trial import TrialEvent, TrialJob, TrialRecord, TrialState
from tests.scheduler.lives import OPERATIONS, Death, Life, Mortality
from tests.scheduler.world import DEVICES, LATE, ChaosRunner, World, described
from tests.workers.scripted import Fault

NUM_TRIALS = 4
#: In so many rounds everything is over once nothing happens any more.
MANY_ROUNDS = 2000
#: Marks of what `make faults` runs.
LONG = [pytest.mark.faults, pytest.mark.timeout(7200)]


class Interleavings(RuleBasedStateMachine):
    """What may happen to a study; class attributes are set by the test."""

    database: Records
    folder: Path
    mortality: Mortality

    @initialize(rungs=st.sampled_from(["stop", "pause", "freeze-thaw"]))
    def begin(self, rungs: str) -> None:
        self.world = World()
        self.mortality.death = None
        self.described = described(
            self.folder, num_trials=NUM_TRIALS, pauses=rungs == "pause", thaws=rungs == "freeze-thaw"
        )
        self.study = self.described.name
        self.started: list[TrialJob] = []
        self.told: list[TrialEvent] = []
        self.over: dict[int, TrialRecord] = {}
        self.num_lives = 0
        self.begin_life()

    def begin_life(self) -> None:
        self.num_lives += 1
        self.world.wants_to_leave = self.world.has_heard = False
        self.life = Life(self.num_lives, self.world, self.mortality, self.database, self.described)
        self.life.go_on()

    def go_on(self) -> None:
        """Have the loop take one more turn; a next driver follows one that is over."""
        if not self.life.is_over:
            self.life.go_on()
        self.replace_driver()

    def replace_driver(self) -> None:
        """Have a next driver follow one that is over."""
        if self.life.is_over:
            self.started += self.life.runner.fake.started
            self.told += self.life.runner.told
            self.begin_life()

    @property
    def runner(self) -> ChaosRunner:
        return self.life.runner

    def command(self, kind: CommandKind, trial: int | None = None, **parameters: float) -> None:
        self.database.send_command(self.study, kind, trial=trial, parameters=parameters, now=0.0)

    # What happens

    @rule(rounds=st.integers(1, 4))
    def let_it_run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.go_on()

    @rule(
        fault=st.sampled_from([Fault.OUT_OF_MEMORY, Fault.NON_FINITE_LOSS, Fault.ERROR, Fault.HANG, None]),
        step=st.integers(1, 4),
    )
    def fail_an_attempt_to_come(self, fault: Fault | None, step: int) -> None:
        self.world.faults.append((fault, step))

    @rule(kind=st.sampled_from(["pause", "resume", "stop"]), trial=st.integers(0, NUM_TRIALS - 1))
    def ask_of_a_trial(self, kind: str, trial: int) -> None:
        self.command(CommandKind(kind), trial)
        self.go_on()

    @rule(kind=st.sampled_from(["pause", "resume", "stop"]))
    def ask_of_the_study(self, kind: str) -> None:
        self.command(CommandKind(kind))
        self.go_on()

    @rule(number=st.integers(0, 9))
    def enqueue(self, number: int) -> None:
        self.command(CommandKind.ENQUEUE, weight_decay=round(0.01 * number, 2))
        self.go_on()

    @rule(number=st.integers(1, 9))
    def hold_devices(self, number: int) -> None:
        self.world.num_refusals = number

    @rule()
    def leave(self) -> None:
        self.world.wants_to_leave = True
        self.go_on()

    @rule()
    def kill_the_driver(self) -> None:
        if not self.life.is_over:
            self.life.kill()
        self.replace_driver()

    @rule(operation=st.sampled_from(OPERATIONS), commit=st.integers(0, 1), is_before=st.booleans())
    def kill_the_driver_at_a_commit(self, operation: str, commit: int, is_before: bool) -> None:
        self.mortality.death = Death(operation=operation, commit=commit, is_before=is_before)
        self.go_on()

    @rule(number=st.integers(0, 3))
    def have_a_device_join(self, number: int) -> None:
        device = [*DEVICES, LATE][number]
        if device not in self.world.present:
            self.world.present.append(device)
        self.go_on()

    @rule(number=st.integers(0, 3))
    def take_a_device(self, number: int) -> None:
        device = [*DEVICES, LATE][number]
        if device in self.world.present:
            self.world.present.remove(device)
            for job in [job for job in self.runner.jobs if device.uuid in job.device_uuids]:
                self.runner.lose(job)
        self.go_on()

    @precondition(lambda self: self.runner.jobs)
    @rule(number=st.integers(0, 9))
    def lose_a_worker(self, number: int) -> None:
        self.runner.lose(self.runner.jobs[number % len(self.runner.jobs)])
        self.go_on()

    @precondition(lambda self: self.told or self.runner.told)
    @rule(number=st.integers(0, 99))
    def tell_again(self, number: int) -> None:
        """Deliver a report a second time, maybe one of an attempt or a driver that is long over."""
        told = [*self.told, *self.runner.told]
        self.runner.due.append(told[-1 - number % len(told)])
        self.go_on()

    # What holds all the while

    @invariant()
    def what_is_recorded_holds(self) -> None:
        """The tables say what the driver knows, and no result is ever changed or taken back."""
        if not hasattr(self, "life"):
            return
        rows = self.rows()
        assert sum(row.state != TrialState.FAILED.value for row in rows) <= NUM_TRIALS
        for number, row in self.over.items():
            assert rows[number] == row, "a trial that was over has changed"
        self.over = {row.number: row for row in rows if TrialState(row.state).is_over}
        if self.life.is_over:
            return
        assert self.life.study is not None
        known = [
            (trial.number, trial.state.value, trial.num_attempts, trial.value, len(trial.measurements))
            for trial in self.life.study.trials()
        ]
        assert [tuple(row) for row in rows] == known
        running = {(row.number, row.num_attempts) for row in rows if row.state == TrialState.RUNNING.value}
        assert {(job.trial, job.attempt) for job in self.runner.jobs} == running

    def rows(self) -> Sequence[sa.Row[tuple[int, str, int, float, int]]]:
        """Return of each trial: number, state, attempts, value, evaluations; as another process reads it."""
        trials, attempts, measurements = tables.trials, tables.attempts, tables.measurements
        num_attempts = sa.select(sa.func.count()).where(attempts.c.trial_id == trials.c.id).scalar_subquery()
        num_evaluations = (
            sa.select(sa.func.count(measurements.c.evaluation.distinct()))
            .select_from(measurements.join(attempts, measurements.c.attempt_id == attempts.c.id))
            .where(attempts.c.trial_id == trials.c.id, measurements.c.evaluation > 0)
            .scalar_subquery()
        )
        query = sa.select(
            trials.c.number,
            trials.c.state,
            num_attempts.label("num_attempts"),
            trials.c.value,
            num_evaluations.label("num_evaluations"),
        ).order_by(trials.c.number)
        with self.database._engine.connect() as connection:
            return connection.execute(query).all()

    def teardown(self) -> None:
        """Let it come to its end undisturbed, and hold it to its promises."""
        if not hasattr(self, "life"):
            return
        try:
            self.come_to_an_end()
            self.what_is_recorded_holds()
            self.all_is_done_once()
        finally:
            empty(self.database)

    def come_to_an_end(self) -> None:
        self.world.calm_down()
        self.mortality.death = None
        self.command(CommandKind.RESUME)
        for trial in self.database.read_study(self.study).trials():
            self.command(CommandKind.RESUME, trial.number)
        for _ in range(MANY_ROUNDS):
            self.go_on()
            if self.life.is_over and self.database.read_study(self.study).num_finished() == NUM_TRIALS:
                return
        raise AssertionError("it never ends")

    def all_is_done_once(self) -> None:
        study = self.database.read_study(self.study)
        trials = study.trials()
        assert study.num_finished() == NUM_TRIALS
        assert all(trial.state.is_finished or trial.state is TrialState.FAILED for trial in trials)
        assert not study.pending_commands()
        attempts = [(job.trial, job.attempt) for job in [*self.started, *self.runner.fake.started]]
        assert len(set(attempts)) == len(attempts), "an attempt was started twice"
        assert set(attempts) <= {(attempt.trial, attempt.number) for attempt in study.attempts()}
        assert all(attempt.ended_at is not None for attempt in study.attempts())
        for trial in trials:
            evaluations = [measurement.evaluation for measurement in trial.measurements]
            assert evaluations == list(range(1, len(evaluations) + 1))
            ran_through = trial.state is TrialState.COMPLETED and trial.failure is None
            assert not ran_through or len(evaluations) == 4


# --- the test -----------------------------------------------------------------------------------------


def empty(database: Records) -> None:
    """Delete every row, so that one database serves all studies and none is slower than the first."""
    with database._engine.begin() as connection:
        for table in reversed(tables.metadata.sorted_tables):
            connection.execute(sa.delete(table))


@pytest.fixture
def without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Optuna's tables out: they follow ours, and are tested by themselves."""
    monkeypatch.setattr(records_module, "refuse_foreign_study", lambda storage, name: None)
    monkeypatch.setattr(Records, "_optuna", lambda self: None)


@pytest.mark.slow
@pytest.mark.usefixtures("without_optuna", "quick_records")
@pytest.mark.parametrize(
    "num_examples",
    [
        pytest.param(15, id="some"),
        pytest.param(100, id="more", marks=pytest.mark.slow),
        pytest.param(3000, id="thousands", marks=[pytest.mark.slow, *LONG]),
    ],
)
def test_whatever_happens_the_number_of_finished_trials_is_exact(
    num_examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_records(f"sqlite:///{tmp_path}/studies.db")) as database:
        Interleavings.database, Interleavings.folder = database, tmp_path
        Interleavings.mortality = Mortality()
        Interleavings.mortality.install(monkeypatch, database._engine)
        run_state_machine_as_test(
            Interleavings,
            settings=settings(
                max_examples=num_examples,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
