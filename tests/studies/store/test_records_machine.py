"""Any interleaving of asking, running, reporting, crashing and reopening keeps the counts exact."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from autosft.studies.store.records import LeaseLostError, StudyRecords, open_records
from autosft.studies.trial import FailureKind, StopReason, TrialState
from tests.studies.study_examples import PLAN, driver, end, evaluation, spec

S = TrialState

#: How attempts end, and what the loop makes of it.
OUTCOMES: list[tuple[dict[str, Any], TrialState]] = [
    ({}, S.COMPLETED),
    ({"stopped": StopReason.PRUNED}, S.STOPPED),
    ({"stopped": StopReason.SHUTDOWN}, S.WAITING),
    ({"stopped": StopReason.USER}, S.PAUSED),
    ({"failure": FailureKind.OUT_OF_MEMORY}, S.WAITING),
    ({"failure": FailureKind.OUT_OF_MEMORY}, S.INFEASIBLE),
    ({"failure": FailureKind.NON_FINITE_LOSS}, S.COMPLETED),
    ({"failure": FailureKind.WORKER_LOST}, S.WAITING),
    ({"failure": FailureKind.ERROR}, S.FAILED),
]

OPTUNA = {S.COMPLETED: "COMPLETE", S.STOPPED: "PRUNED", S.INFEASIBLE: "PRUNED", S.FAILED: "FAIL"}


class StudyMachine(RuleBasedStateMachine):
    """The database against a model of it: for each trial its state, attempts and evaluations."""

    empty: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="autosft-machine-"))
        shutil.copy(self.empty, self.folder / "studies.db")
        self.url = f"sqlite:///{self.folder / 'studies.db'}"
        self.now = 0.0
        self.num_drivers = 0
        self.states: list[TrialState] = []
        self.attempts: list[int] = []
        self.evaluations: list[dict[int, float]] = []
        self.enqueued: list[float] = []
        self.open()

    def open(self) -> None:
        """Open as a new driver, long after the last one was heard of."""
        self.num_drivers += 1
        self.now += 100.0
        self.records = open_records(self.url)
        self.study: StudyRecords = self.records.open_study(spec(), now=self.now)
        self.study.take_over(driver(self.num_drivers), now=self.now)
        running = [number for number, state in enumerate(self.states) if state is S.RUNNING]
        assert list(self.study.recover(now=self.now)) == running
        for number in running:
            self.states[number] = S.WAITING

    def teardown(self) -> None:
        self.records.close()
        shutil.rmtree(self.folder)

    def having(self, *states: TrialState) -> list[int]:
        return [number for number, state in enumerate(self.states) if state in states]

    def one_of(self, data: st.DataObject, *states: TrialState) -> int:
        return data.draw(st.sampled_from(self.having(*states)))

    @rule()
    def ask(self) -> None:
        trial = self.study.ask(now=self.now)
        assert trial.number == len(self.states)
        if self.enqueued:
            assert dict(trial.parameters)["weight_decay"] == self.enqueued.pop(0)
        else:
            assert trial.origin == "sampler"
        self.states.append(S.WAITING)
        self.attempts.append(0)
        self.evaluations.append({})

    @rule(step=st.integers(0, 10))
    def enqueue(self, step: int) -> None:
        decay = round(step * 0.01, 2)
        known = [dict(trial.parameters) for trial in self.study.trials()]
        if self.study.enqueue({"weight_decay": decay}, origin="enqueued", now=self.now):
            self.enqueued.append(decay)
        else:
            assert decay in self.enqueued or any(item["weight_decay"] == decay for item in known)

    @precondition(lambda self: self.having(S.WAITING, S.PAUSED))
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        number = self.one_of(data, S.WAITING, S.PAUSED)
        attempt = self.study.begin_attempt(number, plan=PLAN, device_uuids=("GPU-0",), now=self.now)
        self.attempts[number] += 1
        assert attempt == self.attempts[number]
        self.states[number] = S.RUNNING

    @precondition(lambda self: self.states)
    @rule(data=st.data(), number=st.integers(1, 4), loss=st.floats(0, 10), stale=st.booleans())
    def report(self, data: st.DataObject, number: int, loss: float, stale: bool) -> None:
        trial = data.draw(st.integers(0, len(self.states) - 1))
        attempt = self.attempts[trial] - stale
        counts = self.states[trial] is S.RUNNING and not stale
        known = {measurement.evaluation: measurement for measurement in self.study.trial(trial).measurements}
        repeated = number in known and known[number].attempt == attempt
        assert self.study.record(evaluation(trial, attempt, number, loss), now=self.now) == counts
        if counts and not repeated:
            self.evaluations[trial][number] = loss

    @precondition(lambda self: self.states)
    @rule(data=st.data(), outcome=st.sampled_from(OUTCOMES), stale=st.booleans())
    def end(self, data: st.DataObject, outcome: tuple[dict[str, Any], TrialState], stale: bool) -> None:
        trial = data.draw(st.integers(0, len(self.states) - 1))
        changes, state = outcome
        if state is S.COMPLETED and not changes and not self.evaluations[trial]:
            return  # a run to the end has evaluated
        attempt = self.attempts[trial] - stale
        counts = self.states[trial] is S.RUNNING and not stale
        assert self.study.end_attempt(end(trial, attempt, **changes), state, now=self.now) == counts
        if counts:
            self.states[trial] = state

    @precondition(lambda self: self.having(S.WAITING, S.PAUSED))
    @rule(data=st.data(), state=st.sampled_from([S.INFEASIBLE, S.STOPPED, S.PAUSED, S.WAITING]))
    def set_state(self, data: st.DataObject, state: TrialState) -> None:
        number = self.one_of(data, S.WAITING, S.PAUSED)
        self.study.set_state(number, state, now=self.now)
        self.states[number] = state

    @rule()
    def crash(self) -> None:
        """A driver dies and another one opens the study."""
        self.records.close()
        self.open()

    @rule()
    def is_suspended_and_replaced(self) -> None:
        """A driver that was thought dead wakes up and must not write any more."""
        zombie, records = self.study, self.records
        self.open()
        with pytest.raises(LeaseLostError):
            zombie.ask(now=self.now)
        records.close()

    @invariant()
    def memory_is_right(self) -> None:
        trials = self.study.trials()
        assert [trial.state for trial in trials] == self.states
        assert [trial.num_attempts for trial in trials] == self.attempts
        assert self.study.num_finished() == sum(state.is_finished for state in self.states)
        assert [item.number for item in self.study.unfinished()] == [
            number for number, state in enumerate(self.states) if not state.is_over
        ]
        assert [
            {measurement.evaluation: measurement.metric("eval_loss") for measurement in trial.measurements}
            for trial in trials
        ] == self.evaluations

    @invariant()
    def database_is_right(self) -> None:
        assert self.records.read_study("study").trials() == self.study.trials()

    @invariant()
    def optuna_follows(self) -> None:
        trials = optuna.load_study(study_name="study", storage=self.url).trials
        assert Counter(trial.state.name for trial in trials) == Counter(
            OPTUNA.get(state, "RUNNING") for state in self.states
        )
        assert [trial.user_attrs["trial"] for trial in trials] == list(range(len(self.states)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_runs", "num_steps"),
    [
        pytest.param(6, 12, id="short"),
        pytest.param(20, 30, id="long", marks=[pytest.mark.thorough, pytest.mark.timeout(1800)]),
    ],
)
def test_counts_are_exact_under_any_interleaving(num_runs: int, num_steps: int, empty_sqlite: Path) -> None:
    StudyMachine.empty = empty_sqlite
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run_state_machine_as_test(
        StudyMachine,
        settings=settings(
            max_examples=num_runs,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    optuna.logging.set_verbosity(verbosity)
