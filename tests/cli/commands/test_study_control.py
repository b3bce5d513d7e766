"""`autosft studies pause | resume | stop | enqueue`: what they leave for the driver, and what they refuse."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from autosft import cli
from autosft.studies.store.records import CommandKind, Driver, StudyRecords, open_records
from autosft.studies.trial import TrialState
from tests.studies import study_examples

NAME = "tiny-llama"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture
def study(url: str) -> Iterator[StudyRecords]:
    """A study that this process runs, with a trial that is over and one that runs."""
    with closing(open_records(url)) as records:
        study = records.open_study(study_examples.spec(NAME), now=time.time())
        study.take_over(Driver.current(), now=time.time())
        for value in (2.5, 1.5):
            trial = study.ask(now=2.0).number
            attempt = study_examples.start(study, trial)
            study.record(study_examples.evaluation(trial, attempt, 1, value), now=3.0)
        study.end_attempt(study_examples.end(0, 1), TrialState.COMPLETED, now=4.0)
        yield study


def test_wishes_are_left_for_the_driver(url: str, study: StudyRecords, capsys: pytest.CaptureFixture) -> None:
    for command in (["pause", NAME], ["pause", NAME, "--trial", "1"], ["resume", NAME], ["stop", NAME]):
        assert cli.main(["studies", *command, "--storage", url]) == 0
    out = capsys.readouterr().out
    assert f"pause {NAME}, trial 1: takes effect within seconds" in out
    kinds = [(command.kind, command.trial) for command in study.pending_commands()]
    assert kinds == [
        (CommandKind.PAUSE, None),
        (CommandKind.PAUSE, 1),
        (CommandKind.RESUME, None),
        (CommandKind.STOP, None),
    ]


def test_settings_are_enqueued_as_the_space_has_them(
    url: str, study: StudyRecords, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--learning-rate", "3e-5", "--effective-batch-size", "32", "--json", "--storage", url]
    assert cli.main(["studies", "enqueue", NAME, *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == {"learning_rate": 3e-5, "effective_batch_size": 32}
    assert told["is_running"] is True
    [command] = study.pending_commands()
    assert dict(command.parameters) == {"learning_rate": 3e-5, "effective_batch_size": 32}


REFUSED = [
    (["pause", NAME, "--trial", "7"], "has no trial 7; its trials are 0 to 1"),
    (["stop", NAME, "--trial", "0"], "is over: it is completed"),
    (["enqueue", NAME], "No settings were given"),
    (["enqueue", NAME, "--learning-rate", "3"], "outside the study's search space"),
    (["enqueue", NAME, "--effective-batch-size", "32,64"], "a single value"),
    (["pause", "tiny-lama"], "Did you mean tiny-llama?"),
]


@pytest.mark.parametrize(("command", "words"), REFUSED, ids=[" ".join(item[0]) for item in REFUSED])
def test_what_cannot_be_done_is_refused(
    command: list[str], words: str, url: str, study: StudyRecords, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["studies", *command, "--storage", url]) == 2
    assert words in capsys.readouterr().err
    assert not study.pending_commands()


def test_a_study_that_nobody_runs_is_not_paused_but_its_trials_are(
    url: str, study: StudyRecords, capsys: pytest.CaptureFixture
) -> None:
    study.release(now=time.time())
    assert cli.main(["studies", "stop", NAME, "--storage", url]) == 2
    assert "is not running" in capsys.readouterr().err
    assert cli.main(["studies", "stop", NAME, "--trial", "1", "--storage", url]) == 0
    assert "takes effect when the study runs again" in capsys.readouterr().out
