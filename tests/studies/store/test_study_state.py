"""What is kept of a study in memory: counts and sets that follow every change, and the database alike."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import closing
from pathlib import Path

import pytest

from autosft.studies.store.records import open_records
from autosft.studies.store.study_state import StudyState, new_trial
from autosft.studies.trial import DEFAULT_ORIGIN, TrialRecord, TrialState
from tests.studies.study_examples import opened
from tests.workers.small import settings


def trial(number: int, state: TrialState) -> TrialRecord:
    made = new_trial(number, settings(), {}, origin=DEFAULT_ORIGIN)
    return dataclasses.replace(made, state=state)


def recounted(state: StudyState) -> tuple[int, set[int]]:
    """What the two counts stand for."""
    finished = [trial for trial in state.trials if trial.state.is_finished]
    return len(finished), {trial.number for trial in state.trials if not trial.state.is_over}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(TrialState, TrialState)))
def test_counts_follow_every_change_of_a_trial(before: TrialState, after: TrialState) -> None:
    state = StudyState()
    state.add(trial(0, TrialState.COMPLETED), 10)
    state.add(trial(1, before), 11)
    assert (state.num_finished, state.unfinished) == recounted(state)
    state.keep(trial(1, after))
    assert (state.num_finished, state.unfinished) == recounted(state)
    assert [kept.state for kept in state.trials] == [TrialState.COMPLETED, after]
    assert state.ids == [10, 11]


@pytest.mark.parametrize(
    ("state", "num_attempts", "asked", "is_running"),
    [
        (TrialState.RUNNING, 2, 2, True),
        (TrialState.RUNNING, 2, 1, False),
        (TrialState.WAITING, 2, 2, False),
    ],
)
def test_only_the_last_attempt_of_a_running_trial_runs(
    state: TrialState, num_attempts: int, asked: int, is_running: bool
) -> None:
    kept = StudyState()
    kept.add(dataclasses.replace(trial(0, state), num_attempts=num_attempts), 1)
    assert kept.is_running(0, asked) == is_running


def test_what_was_enqueued_waits_for_its_own_study(tmp_path: Path) -> None:
    """Also where both are read from the database again."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    rates = {"first": 2e-4, "second": 3e-4}
    with closing(open_records(url)) as records:
        for name, rate in rates.items():
            study = opened(records, name=name)
            study.enqueue({"learning_rate": rate}, origin="mine", now=0.0)
            study.release(now=0.0)
    with closing(open_records(url)) as records:
        for name, rate in rates.items():
            asked = opened(records, name=name, number=2).ask(now=1.0)
            assert (asked.settings.learning_rate, asked.origin) == (rate, "mine")
