"""What the study database promises, over SQLite and PostgreSQL."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.search.space import FixedSettings, default_parameters, neighbours
from autosft.studies.store.records import (
    Direction,
    Records,
    open_records,
)
from autosft.studies.trial import FailureKind, StopReason, TrialState
from tests.studies.study_examples import PINNED, PLAN, end, evaluation, opened, progress, space, spec, start


def reopened(records: Records, name: str = "study"):
    """Read a study afresh: what a process that starts now would see."""
    return records.read_study(name)


# Studies


def test_a_study_comes_back_as_it_was(records: Records, url: str) -> None:
    opened(records, now=7.0)
    again = open_records(url)
    assert again.find_study("study") == spec()
    [overview] = again.studies()
    assert (overview.spec, overview.created_at, overview.best_value) == (spec(), 7.0, None)
    again.close()


@pytest.mark.parametrize(
    "name", ["../x", "it's", 'a "b"', "emoji 🦙", "x" * 200, "%s {SCHEMA_VERSION} \\ ;--"]
)
def test_any_name_is_kept_as_it_is(records: Records, name: str) -> None:
    study = opened(records, name=name)
    study.ask(now=1.0)
    assert reopened(records, name).trials() == study.trials()


@pytest.mark.parametrize("name", ["", "  ", "x" * 201])
def test_a_name_that_cannot_be_is_refused(records: Records, name: str) -> None:
    with pytest.raises(UserError, match="1 to 200 characters"):
        records.open_study(spec(name), now=0.0)
    assert records.studies() == ()


DIFFERENCES = {
    "model": ({"model_fingerprint": "x" * 64, "model": "other"}, "model: was models/tiny"),
    "data": ({"data_fingerprint": "x" * 64}, "data: was data.jsonl"),
    "metric": ({"metric": "accuracy"}, "metric: was eval_loss"),
    "direction": ({"direction": Direction.MAXIMIZE}, "metric: was eval_loss, minimize"),
    "evaluation": (
        {"pinned": dataclasses.replace(PINNED, eval_fingerprint="x")},
        "eval_fingerprint: was eee",
    ),
    "precision": ({"pinned": dataclasses.replace(PINNED, tf32=True)}, "tf32: was False, now True"),
    "space": ({"space": space(optimizer=space()["method"])}, "optimizer: was adamw_torch_fused, now full"),
    "seed": ({"seed": 1}, "seed: was 0, now 1"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_two_things_are_never_merged_under_one_name(records: Records, case: str) -> None:
    changes, said = DIFFERENCES[case]
    records.open_study(spec(), now=0.0)
    with pytest.raises(UserError, match=said) as raised:
        records.open_study(spec(**changes), now=1.0)
    assert "--study OTHER" in str(raised.value)
    assert records.find_study("study") == spec()


def test_resuming_may_ask_for_more_trials_and_move_folders(records: Records) -> None:
    records.open_study(spec(num_trials=10), now=0.0)
    study = records.open_study(spec(num_trials=20, model="moved/tiny"), now=1.0)
    assert study.spec.num_trials == 20
    assert records.find_study("study").num_trials == 20


def test_an_unknown_study_names_the_nearest(records: Records) -> None:
    records.open_study(spec("llama-run"), now=0.0)
    with pytest.raises(UserError, match="llama-run"):
        records.read_study("lama-run")


def test_an_optuna_study_of_somebody_else_is_left_alone(sqlite_url: str) -> None:
    import optuna

    theirs = optuna.create_study(study_name="study", storage=sqlite_url)
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    records = open_records(sqlite_url)
    with pytest.raises(UserError, match="that autosft did not create"):
        records.open_study(spec(), now=0.0)
    assert records.studies() == ()
    assert len(theirs.trials) == 1
    records.close()


# The way of a trial


def test_a_trial_from_asking_to_its_end(records: Records) -> None:
    study = opened(records)
    trial = study.ask(now=1.0)
    assert (trial.number, trial.state, trial.num_attempts, trial.origin) == (
        0,
        TrialState.WAITING,
        0,
        "sampler",
    )
    assert start(study, 0, now=2.0) == 1
    assert study.trial(0).state is TrialState.RUNNING
    assert study.record(progress(0, 1, 5), now=3.0)
    for number, loss in enumerate((2.0, 1.5, 1.7), start=1):
        assert study.record(evaluation(0, 1, number, loss, checkpoint=f"nowhere/{number}"), now=4.0)
    assert study.end_attempt(end(0, 1), TrialState.COMPLETED, now=5.0)

    done = study.trial(0)
    assert (done.state, done.value, done.best_step, done.best_checkpoint) == (
        TrialState.COMPLETED,
        1.5,
        20,
        "nowhere/2",
    )
    assert [measurement.metric("eval_loss") for measurement in done.measurements] == [2.0, 1.5, 1.7]
    assert (done.started_at, done.finished_at, done.plan) == (2.0, 5.0, PLAN)
    assert study.num_finished() == 1
    assert study.unfinished() == ()
    fresh = reopened(records)
    assert fresh.trials() == study.trials()
    assert fresh.checkpoints() == study.checkpoints()
    assert [item.step for item in fresh.progress(0)] == [5, 10, 20, 30]


def test_a_checkpoint_of_a_step_that_was_reported_before_is_kept(records: Records) -> None:
    """As an attempt saves it when it is told to stop: its trial goes on from there."""
    study = opened(records)
    study.ask(now=0.0)
    start(study, 0)
    assert study.record(progress(0, 1, 7), now=1.0)
    saved = dataclasses.replace(progress(0, 1, 7), checkpoint="nowhere/7")
    for _ in range(2):
        assert study.record(saved, now=2.0)
    assert [(checkpoint.step, checkpoint.path) for checkpoint in study.checkpoints()] == [(7, "nowhere/7")]
    fresh = reopened(records)
    assert fresh.checkpoints() == study.checkpoints()
    assert [item.checkpoint for item in fresh.progress(0)] == ["nowhere/7"]


def test_the_same_report_twice_counts_once(records: Records) -> None:
    study = opened(records)
    study.ask(now=0.0)
    start(study, 0)
    for _ in range(2):
        assert study.record(evaluation(0, 1, 1), now=1.0)
        assert study.record(progress(0, 1, 5), now=1.0)
    assert len(study.progress(0)) == 2
    assert len(study.trial(0).measurements) == 1


def test_reports_of_an_attempt_that_is_over_are_refused(records: Records) -> None:
    study = opened(records)
    study.ask(now=0.0)
    assert not study.record(evaluation(0, 1, 1), now=0.0)  # before any attempt
    start(study, 0)
    lost = end(0, 1, failure=FailureKind.WORKER_LOST)
    assert study.end_attempt(lost, TrialState.WAITING, now=1.0)
    before = study.trials()
    assert not study.end_attempt(lost, TrialState.FAILED, now=2.0)
    assert not study.record(evaluation(0, 1, 1), now=2.0)
    assert start(study, 0) == 2
    assert not study.record(evaluation(0, 1, 1), now=3.0)
    assert not study.end_attempt(end(0, 1), TrialState.COMPLETED, now=3.0)
    assert before[0].failure is FailureKind.WORKER_LOST
    assert study.trial(0).measurements == ()
    assert reopened(records).trials() == study.trials()


def test_an_evaluation_repeated_by_a_later_attempt_replaces_the_earlier(records: Records) -> None:
    study = opened(records)
    study.ask(now=0.0)
    start(study, 0)
    study.record(evaluation(0, 1, 1, 2.0), now=1.0)
    study.record(evaluation(0, 1, 2, 1.0), now=1.0)
    study.end_attempt(end(0, 1, failure=FailureKind.WORKER_LOST), TrialState.WAITING, now=2.0)
    start(study, 0)
    study.record(evaluation(0, 2, 2, 1.1), now=3.0)
    assert [(measurement.attempt, measurement.evaluation) for measurement in study.trial(0).measurements] == [
        (1, 1),
        (2, 2),
    ]
    assert study.trial(0).value == 1.1
    assert reopened(records).trials() == study.trials()


ENDS = {
    "completed": (end(0, 1), TrialState.COMPLETED, 1.0, 1),
    "stopped": (end(0, 1, stopped=StopReason.PRUNED), TrialState.STOPPED, 1.0, 1),
    "out of time": (end(0, 1, stopped=StopReason.BUDGET), TrialState.STOPPED, 1.0, 1),
    "good enough": (end(0, 1, stopped=StopReason.TARGET), TrialState.STOPPED, 1.0, 1),
    "by hand": (end(0, 1, stopped=StopReason.USER), TrialState.STOPPED, 1.0, 1),
    "non-finite": (end(0, 1, failure=FailureKind.NON_FINITE_LOSS), TrialState.COMPLETED, math.inf, 1),
    "does not fit": (end(0, 1, failure=FailureKind.OUT_OF_MEMORY), TrialState.INFEASIBLE, 1.0, 1),
    "broken": (end(0, 1, failure=FailureKind.ERROR), TrialState.FAILED, 1.0, 0),
    "lost": (end(0, 1, failure=FailureKind.WORKER_LOST), TrialState.WAITING, 1.0, 0),
    "left": (end(0, 1, stopped=StopReason.SHUTDOWN), TrialState.WAITING, 1.0, 0),
    "paused": (end(0, 1, stopped=StopReason.PAUSED), TrialState.PAUSED, 1.0, 0),
}
MESSAGES = {  # where the trial's is not the attempt's: not to be taken for one that its peers have beaten
    "out of time": "time budget over",
    "good enough": "target reached",
    "by hand": "stopped by the user",
}


@pytest.mark.parametrize("case", ENDS)
def test_every_end_is_recorded_as_what_it_was(records: Records, case: str) -> None:
    last, state, value, num_finished = ENDS[case]
    study = opened(records)
    study.ask(now=0.0)
    start(study, 0)
    study.record(evaluation(0, 1, 1, 1.0), now=1.0)
    study.end_attempt(last, state, now=2.0)
    trial = study.trial(0)
    assert (trial.state, trial.value, trial.failure) == (state, value, last.failure)
    assert trial.message == MESSAGES.get(case, last.message)
    assert study.num_finished() == num_finished
    assert (trial.finished_at is not None) == state.is_over
    fresh = reopened(records)
    assert fresh.trials() == study.trials()
    assert fresh.num_finished() == num_finished


@pytest.mark.parametrize("direction", Direction)
def test_the_best_evaluation_is_the_trials_value_and_nan_never_is(
    records: Records, direction: Direction
) -> None:
    study = opened(records, direction=direction)
    study.ask(now=0.0)
    start(study, 0)
    for number, loss in enumerate((math.nan, 2.0, 1.0, 3.0), start=1):
        study.record(evaluation(0, 1, number, loss), now=1.0)
    assert study.trial(0).value == (1.0 if direction is Direction.MINIMIZE else 3.0)
    assert study.trial(0).best_step == (30 if direction is Direction.MINIMIZE else 40)
    fresh = reopened(records).trial(0)
    assert math.isnan(fresh.measurements[0].metric("eval_loss"))
    assert fresh.measurements[1:] == study.trial(0).measurements[1:]


def test_a_trial_can_be_abandoned_or_paused_without_an_attempt(records: Records) -> None:
    study = opened(records)
    for _ in range(2):
        study.ask(now=0.0)
    study.set_state(0, TrialState.INFEASIBLE, message="needs 9 GiB", now=1.0)
    study.set_state(1, TrialState.PAUSED, now=1.0)
    assert (study.num_finished(), study.trial(0).message) == (1, "needs 9 GiB")
    study.set_state(1, TrialState.WAITING, now=2.0)
    assert [item.number for item in study.unfinished()] == [1]
    assert reopened(records).trials() == study.trials()


# Asking


def test_enqueued_parameters_come_first_and_once(records: Records) -> None:
    study = opened(records)
    default = default_parameters(study.spec.space)
    wanted = [
        (default, "default"),
        *((neighbour, "neighbour") for neighbour in neighbours(study.spec.space, default)),
    ]
    for _ in range(2):  # a second run enqueues the same again
        for parameters, origin in wanted:
            study.enqueue(parameters, origin=origin, now=0.0)
    asked = [study.ask(now=1.0) for _ in range(4)]
    assert [item.origin for item in asked] == ["default", "neighbour", "neighbour", "sampler"]
    assert [dict(item.parameters) for item in asked[:3]] == [parameters for parameters, _ in wanted]
    assert not study.enqueue(default, origin="default", now=2.0)
    assert reopened(records).trials() == study.trials()


def test_an_origin_may_be_given_other_amounts_of_data(records: Records) -> None:
    fixed = FixedSettings(num_train_examples=500, examples_of=(("laptop-8gb B", 600),))
    study = opened(records, fixed=fixed)
    default = default_parameters(study.spec.space)
    study.enqueue(default, origin="laptop-8gb A", now=0.0)
    study.enqueue({**default, "learning_rate": 6e-5}, origin="laptop-8gb B", now=0.0)
    asked = [study.ask(now=1.0) for _ in range(3)]
    assert [item.settings.num_train_examples for item in asked] == [500, 600, 500]
    assert reopened(records).trials() == study.trials()


def test_what_is_outside_the_space_is_not_enqueued(records: Records) -> None:
    study = opened(records)
    with pytest.raises(UserError, match=r"learning_rate: 5\.0 is outside"):
        study.enqueue({"learning_rate": 5.0}, origin="enqueued", now=0.0)
    with pytest.raises(UserError, match="Did you mean learning_rate"):
        study.enqueue({"learningrate": 1e-4}, origin="enqueued", now=0.0)


@pytest.mark.slow
def test_asking_again_after_a_crash_gives_the_same(tmp_path: Path) -> None:
    asked = []
    for copy in range(2):
        records = open_records(f"sqlite:///{tmp_path}/{copy}.db")
        study = opened(records)
        for number in range(12):
            if copy and number % 3 == 0:  # the other driver dies before each third one
                study = opened(records, now=100.0 * (number + 1), number=number)
            study.ask(now=0.0)
            start(study, number)
            study.record(evaluation(number, 1, 1, 1.0 / (number + 1)), now=0.0)
            study.end_attempt(end(number, 1), TrialState.COMPLETED, now=0.0)
        asked.append([trial.parameters for trial in study.trials()])
        records.close()
    assert asked[0] == asked[1]
