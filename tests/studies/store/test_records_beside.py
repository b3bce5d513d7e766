"""What is kept beside the course of trials: attempts, commands, memory, scores."""

from __future__ import annotations

import dataclasses
import sqlite3
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.studies.store.records import CheckpointScore, CommandKind, Records, open_records
from autosft.studies.trial import FailureKind, TrialState
from tests.studies.study_examples import PLAN, end, opened, progress, start


def test_every_attempt_is_reported_with_where_it_ran_and_how_it_ended(records: Records) -> None:
    study = opened(records)
    study.ask(now=1.0)
    start(study, 0, now=2.0)
    study.end_attempt(end(0, 1, failure=FailureKind.WORKER_LOST), TrialState.WAITING, now=3.0)
    start(study, 0, now=4.0)
    first, second = records.read_study("study").attempts()
    assert (first.number, first.outcome, first.message) == (1, "worker lost", "it was worker lost")
    assert (first.started_at, first.ended_at, first.device_uuids) == (2.0, 3.0, ("GPU-0",))
    assert first.predicted_bytes == PLAN.estimate.total_bytes
    assert (second.number, second.outcome, second.ended_at) == (2, None, None)


def test_commands_of_users_reach_the_driver_once(records: Records, url: str) -> None:
    study = opened(records)
    elsewhere = open_records(url)  # another process of the user's
    elsewhere.send_command("study", CommandKind.PAUSE, now=1.0)
    elsewhere.send_command("study", CommandKind.ENQUEUE, parameters={"weight_decay": 0.05}, now=2.0)
    elsewhere.send_command("study", CommandKind.STOP, trial=3, now=3.0)
    with pytest.raises(UserError, match="no study named"):
        elsewhere.send_command("other", CommandKind.STOP, now=3.0)
    elsewhere.close()
    commands = study.pending_commands()
    assert [(command.kind, command.trial) for command in commands] == [
        (CommandKind.PAUSE, None),
        (CommandKind.ENQUEUE, None),
        (CommandKind.STOP, 3),
    ]
    assert dict(commands[1].parameters) == {"weight_decay": 0.05}
    for command in commands[:2]:
        study.finish_command(command.id, now=4.0)
    assert [command.id for command in study.pending_commands()] == [commands[2].id]


def test_memory_observations_are_kept_over_studies_and_once(records: Records) -> None:
    for name in ("first", "second"):
        study = opened(records, name=name)
        study.ask(now=0.0)
        for _ in range(2):
            study.add_memory_observation(
                trial=0, attempt=1, plan=PLAN, allocated_bytes=5, reserved_bytes=None, now=1.0
            )
    found = records.memory_observations()
    assert [(item.study, item.measured_allocated_bytes) for item in found] == [("first", 5), ("second", 5)]
    assert found[0].plan == PLAN
    assert found[0].settings == study.trial(0).settings


def test_readers_never_wait_for_a_writer(sqlite_url: str, tmp_path: Path) -> None:
    records = open_records(sqlite_url)
    study = opened(records)
    study.ask(now=0.0)
    writer = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert len(records.read_study("study").trials()) == 1
    assert len(records.studies()) == 1
    writer.execute("ROLLBACK")
    writer.close()
    records.close()


def score(trial: int, step: int, **changes: object) -> CheckpointScore:
    made = CheckpointScore(
        trial=trial,
        step=step,
        examples="final",
        metric="eval_loss",
        value=1.5,
        low=1.4,
        high=1.6,
        num_examples=160,
        recorded_at=9.0,
    )
    return dataclasses.replace(made, **changes)


def test_scores_of_checkpoints_are_kept_and_replaced(records: Records) -> None:
    study = opened(records)
    for _ in range(2):
        study.ask(now=0.0)
    study.add_scores([score(1, 20), score(0, 10), score(0, 10, metric="ifeval", low=None, high=None)])
    study.release(now=1.0)
    without_lease = records.read_study("study")
    without_lease.add_scores([score(0, 10, value=1.3)])
    assert without_lease.scores() == (
        score(0, 10, metric="ifeval", low=None, high=None),
        score(0, 10, value=1.3),
        score(1, 20),
    )


def test_the_state_of_the_gpu_is_kept_beside_measurements(records: Records) -> None:
    study = opened(records)
    study.ask(now=0.0)
    start(study, 0)
    hot = dataclasses.replace(progress(0, 1, 5), temperature_c=83.0, throttle_reasons=("thermal", "power"))
    for report in (hot, progress(0, 1, 6)):
        study.record(report, now=1.0)
    assert study.progress(0) == (hot, progress(0, 1, 6))
