"""Optuna's tables follow ours: readable, complete, and repaired whatever happened to them."""

from __future__ import annotations

import math
import sqlite3
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState as OptunaState

from autosft.studies.dashboard.artifacts import StudyArtifacts
from autosft.studies.store.optuna_projection import Projection
from autosft.studies.store.records import Direction, Records, StudyRecords, open_records
from autosft.studies.trial import FailureKind, StopReason, TrialState
from tests.studies.study_examples import driver, end, evaluation, opened, spec, start

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(verbosity)


def theirs(url: str, name: str = "study") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=_optuna_url(url))


def _optuna_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")


def finish(study: StudyRecords, losses: list[float], state: TrialState, **changes: object) -> int:
    number = study.ask(now=0.0).number
    attempt = start(study, number)
    for k, loss in enumerate(losses, start=1):
        study.record(evaluation(number, attempt, k, loss), now=1.0)
    study.end_attempt(end(number, attempt, **changes), state, now=2.0)
    return number


def test_every_state_reaches_optuna_as_what_the_sampler_should_see(records: Records, url: str) -> None:
    study = opened(records)
    finish(study, [2.0, 1.0, 1.5], TrialState.COMPLETED)
    finish(study, [2.0, 2.5], TrialState.STOPPED, stopped=StopReason.PRUNED)
    finish(study, [], TrialState.STOPPED, stopped=StopReason.USER)
    finish(study, [1.2], TrialState.INFEASIBLE, failure=FailureKind.OUT_OF_MEMORY)
    finish(study, [], TrialState.FAILED, failure=FailureKind.ERROR)
    finish(study, [1.0], TrialState.COMPLETED, failure=FailureKind.NON_FINITE_LOSS)
    finish(study, [1.1], TrialState.WAITING, failure=FailureKind.WORKER_LOST)
    trials = theirs(url).trials
    assert [(trial.state, trial.value) for trial in trials] == [
        (OptunaState.COMPLETE, 1.0),  # the best evaluation
        (OptunaState.PRUNED, 2.5),  # the last one
        (OptunaState.PRUNED, None),
        (OptunaState.PRUNED, None),  # no made-up loss
        (OptunaState.FAIL, None),
        (OptunaState.COMPLETE, math.inf),
        (OptunaState.RUNNING, None),
    ]
    assert [bool(trial.constraints) and max(trial.constraints.values()) > 0 for trial in trials] == [
        number == 3 for number in range(7)
    ]
    assert trials[0].intermediate_values == {1000: 2.0, 2000: 1.0, 3000: 1.5}  # by training tokens
    assert [trial.params for trial in trials] == [dict(trial.parameters) for trial in study.trials()]
    assert theirs(url).best_value == 1.0


def test_a_trial_that_is_taken_up_again_is_a_further_one_there(records: Records, url: str) -> None:
    """Optuna lets no trial that has ended be changed."""
    study = opened(records, number=1)
    number = finish(study, [], TrialState.FAILED, failure=FailureKind.WORKER_LOST)
    study.recover(now=3.0)
    assert [trial.state for trial in theirs(url).trials] == [OptunaState.FAIL]
    study.release(now=3.0)
    for run in (2, 3):  # the second time nothing is left to mend
        study = records.open_study(spec(), now=4.0)
        study.take_over(driver(run), now=4.0)
        if run == 2:
            study.take_up_again(number, now=4.0)
        study.recover(now=4.0)
        if run == 2:
            attempt = start(study, number)
            study.record(evaluation(number, attempt, 1, 1.5), now=5.0)
            study.end_attempt(end(number, attempt), TrialState.COMPLETED, now=6.0)
        study.release(now=7.0)
        assert [(trial.state, trial.value) for trial in theirs(url).trials] == [
            (OptunaState.FAIL, None),
            (OptunaState.COMPLETE, 1.5),
        ]


def test_the_direction_is_told(records: Records, url: str) -> None:
    study = opened(records, direction=Direction.MAXIMIZE)
    finish(study, [1.0, 3.0, 2.0], TrialState.COMPLETED)
    finish(study, [9.0], TrialState.COMPLETED, failure=FailureKind.NON_FINITE_LOSS)
    assert theirs(url).direction is optuna.study.StudyDirection.MAXIMIZE
    assert [trial.value for trial in theirs(url).trials] == [3.0, -math.inf]


def test_people_can_read_why_and_how_much(records: Records, url: str) -> None:
    study = opened(records)
    finish(study, [1.0], TrialState.COMPLETED)
    finish(study, [], TrialState.INFEASIBLE, failure=FailureKind.OUT_OF_MEMORY)
    done, too_big = (trial.user_attrs for trial in theirs(url).trials)
    assert done == {
        "trial": 0,
        "origin": "sampler",
        "state": "completed",
        "best step": 10,
        "plan": "test device: micro batch 4 x accumulation 8 x devices 1",
        "predicted memory (GiB)": 2.0,
        "predicted memory, at most (GiB)": 3.0,
        "measured memory (GiB)": 2.0,
        "speed (tokens/s)": 9000,
        "from start to end (min)": 0.03,
    }
    assert too_big["state"] == "infeasible"
    assert too_big["because"] == "out of device memory: it was out of device memory"
    attributes = theirs(url).user_attrs
    assert (attributes["metric"], attributes["model"], attributes["data"]) == (
        "eval_loss",
        "models/tiny",
        "data.jsonl",
    )
    assert theirs(url).metric_names == ["eval_loss"]


def test_constraints_name_what_was_violated(records: Records, url: str) -> None:
    study = opened(records)
    finish(study, [1.0], TrialState.COMPLETED)
    finish(study, [], TrialState.INFEASIBLE, failure=FailureKind.OUT_OF_MEMORY)
    refused = study.ask(now=0.0).number
    study.set_state(refused, TrialState.INFEASIBLE, message="needs 9 GiB", now=1.0)
    named = [
        {name for name, value in trial.constraints.items() if value > 0 and not name.isdigit()}
        for trial in theirs(url).trials
    ]
    assert named == [set(), {"measured out of memory"}, {"predicted memory over budget"}]
    # What the dashboard reads:
    assert [trial.system_attrs["constraints"] for trial in theirs(url).trials] == [[0, 0], [0, 1], [1, 0]]


def test_a_trial_has_its_artifacts_from_its_start(records: Records, url: str, tmp_path: Path) -> None:
    study = opened(records)
    running = study.ask(now=0.0).number
    start(study, running)
    log = tmp_path / "attempt-1.log"
    log.write_text("step 1\n")
    store = StudyArtifacts(records, tmp_path / "uploads")

    def read() -> dict[str, str]:
        [trial] = theirs(url).trials
        listed = optuna.artifacts.get_all_artifact_meta(trial, storage=theirs(url)._storage)
        return {item.filename: store.open_reader(item.artifact_id).read().decode() for item in listed}

    before = read()
    assert before.keys() == {"learning-curve.svg", "memory.svg", "configuration.yaml", "log.txt"}
    assert "nothing has been measured yet" in before["learning-curve.svg"]
    assert "predicted 2.0 GiB, at most 3.0 GiB" in before["memory.svg"]

    study.record(evaluation(running, 1, 1, 1.5), now=1.0)
    study.record(evaluation(running, 1, 2, 1.25), now=2.0)
    study.end_attempt(end(running, 1, log_path=str(log)), TrialState.COMPLETED, now=3.0)
    after = read()
    for picture in (after["learning-curve.svg"], after["memory.svg"]):
        xml.etree.ElementTree.fromstring(picture)
    assert "polyline" in after["learning-curve.svg"]
    assert "measured 2.0 GiB" in after["memory.svg"]
    assert "value: 1.25" in after["configuration.yaml"]
    assert after["log.txt"].endswith("step 1\n")
    with pytest.raises(optuna.artifacts.exceptions.ArtifactNotFound):
        store.open_reader("a5f7-63-0-3")


@pytest.fixture
def snapshot(url: str):
    """Return everything in Optuna's study but its times."""

    def take() -> list[tuple[object, ...]]:
        return [
            (
                trial.number,
                trial.state,
                trial.value,
                trial.params,
                trial.intermediate_values,
                trial.user_attrs,
                trial.constraints,
            )
            for trial in theirs(url).trials
        ]

    return take


def test_opening_again_changes_nothing(records: Records, snapshot) -> None:
    study = opened(records)
    finish(study, [2.0, 1.0], TrialState.COMPLETED)
    finish(study, [2.0, math.nan], TrialState.STOPPED, stopped=StopReason.PRUNED)
    finish(study, [1.1], TrialState.WAITING, failure=FailureKind.WORKER_LOST)
    before = repr(snapshot())
    for number in range(2, 4):
        opened(records, now=100.0 * number, number=number)
        assert repr(snapshot()) == before


MISSED = {
    "creating": ["create"],
    "an evaluation": ["measure", "finish"],
    "the end": ["finish"],
    "attributes": ["_set_attributes"],
    "everything": ["create", "measure", "finish"],
}


@pytest.mark.parametrize("case", MISSED)
def test_what_was_missed_is_made_up_for(
    case: str, records: Records, snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        for method in MISSED[case]:
            patched.setattr(Projection, method, lambda *_: None)
        study = opened(records)
        finish(study, [2.0, 1.0], TrialState.COMPLETED)
        study.ask(now=3.0)
    opened(records, now=100.0, number=2)
    assert [(item[1], item[2], item[4]) for item in snapshot()] == [
        (OptunaState.COMPLETE, 1.0, {1000: 2.0, 2000: 1.0}),
        (OptunaState.RUNNING, None, {}),
    ]
    assert [(item[5]["trial"], item[5].get("best step")) for item in snapshot()] == [(0, 20), (1, None)]


@pytest.mark.parametrize("now", [0.0, 0.5])
def test_the_first_time_is_due_whatever_the_clock_says(records: Records, url: str, now: float) -> None:
    study = opened(records)
    study.project_later()
    study.ask(now=now)
    fresh = records.open_study(spec(), now=now)
    study.release(now=now)
    fresh.project_later()
    fresh.take_over(driver(2), now=now)
    fresh.recover(now=now)
    fresh.ask(now=now)
    fresh.project(now=now)
    assert len(theirs(url).trials) == len(fresh.trials()) == 2


def test_a_study_that_runs_is_followed_once_a_second(records: Records, url: str) -> None:
    study = opened(records)
    study.project_later()
    study.project(now=10.0)
    finish(study, [2.0, 1.0], TrialState.COMPLETED)
    study.project(now=10.9)
    assert theirs(url).trials == []
    study.project(now=11.0)
    [one] = theirs(url).trials
    assert (one.state, one.value, one.intermediate_values) == (
        OptunaState.COMPLETE,
        1.0,
        {1000: 2.0, 2000: 1.0},
    )
    assert one.user_attrs["best step"] == 20
    study.ask(now=11.5)
    study.release(now=11.6)
    assert [trial.state for trial in theirs(url).trials] == [OptunaState.COMPLETE, OptunaState.RUNNING]


def test_trials_that_are_not_ours_are_closed_and_not_counted(records: Records, url: str) -> None:
    study = opened(records)
    finish(study, [1.0], TrialState.COMPLETED)
    theirs(url).ask()  # as a driver that died between Optuna's commit and ours would leave it, or a stranger
    theirs(url).add_trial(optuna.trial.create_trial(value=0.5))
    again = opened(records, now=100.0, number=2)
    finish(again, [2.0], TrialState.COMPLETED)
    assert [trial.number for trial in again.trials()] == [0, 1]
    assert again.num_finished() == 2
    assert [(trial.state, trial.user_attrs.get("trial")) for trial in theirs(url).trials] == [
        (OptunaState.COMPLETE, 0),
        (OptunaState.FAIL, None),
        (OptunaState.COMPLETE, None),
        (OptunaState.COMPLETE, 1),
    ]


def test_a_study_continues_while_optunas_tables_are_locked(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autosft.studies.store import database

    monkeypatch.setattr(database, "QUIET_S", 0.01)
    records = open_records(sqlite_url)
    study = opened(records)
    number = study.ask(now=0.0).number
    attempt = start(study, number)
    kept = Projection.measure

    def locked(projection: Projection, measurement) -> None:
        blocker = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        try:
            kept(projection, measurement)
        finally:
            blocker.execute("ROLLBACK")
            blocker.close()

    with monkeypatch.context() as patched:
        patched.setattr(Projection, "measure", locked)
        assert study.record(evaluation(number, attempt, 1, 2.0), now=1.0)
    assert theirs(sqlite_url).trials[0].intermediate_values == {}
    assert study.record(evaluation(number, attempt, 2, 1.0), now=2.0)
    assert theirs(sqlite_url).trials[0].intermediate_values == {1000: 2.0, 2000: 1.0}
    records.close()


def test_a_study_continues_when_somebody_deletes_it_in_the_dashboard(records: Records, url: str) -> None:
    study = opened(records)
    finish(study, [1.0], TrialState.COMPLETED)
    optuna.delete_study(study_name="study", storage=_optuna_url(url))
    finish(study, [2.0], TrialState.COMPLETED)
    finish(study, [3.0], TrialState.COMPLETED)
    assert study.num_finished() == 3
    assert [(trial.state, trial.value) for trial in theirs(url).trials] == [
        (OptunaState.COMPLETE, 1.0),
        (OptunaState.COMPLETE, 2.0),
        (OptunaState.COMPLETE, 3.0),
    ]


def test_a_study_continues_when_somebody_ends_its_trial(records: Records, url: str) -> None:
    study = opened(records)
    number = study.ask(now=0.0).number
    attempt = start(study, number)
    theirs(url).tell(0, 5.0)
    study.record(evaluation(number, attempt, 1, 1.0), now=1.0)
    study.end_attempt(end(number, attempt), TrialState.COMPLETED, now=2.0)
    finish(study, [2.0], TrialState.COMPLETED)
    assert [trial.value for trial in study.trials()] == [1.0, 2.0]
    assert [trial.value for trial in theirs(url).trials] == [5.0, 2.0]


def test_two_studies_share_a_database(records: Records, url: str) -> None:
    first, second = opened(records, name="first"), opened(records, name="second", number=2)
    finish(first, [1.0], TrialState.COMPLETED)
    finish(second, [2.0], TrialState.COMPLETED)
    finish(first, [3.0], TrialState.COMPLETED)
    assert [trial.value for trial in theirs(url, "first").trials] == [1.0, 3.0]
    assert [trial.value for trial in theirs(url, "second").trials] == [2.0]
