"""How far an item is and when it ends: a study by its records, a single run by what it has printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from autosft.service.drivers.process_drivers import START, log_path, present_words
from autosft.service.drivers.progress import item_progress
from autosft.service.values import Arguments
from autosft.studies.store.records import Records, open_records
from autosft.studies.trial import TrialState
from tests.service.examples import NOW, runs
from tests.studies.study_examples import end, evaluation, opened, start


@pytest.fixture
def records(sqlite_url: str) -> Records:
    return open_records(sqlite_url)


def running(**changes: object):  # type: ignore[no-untyped-def]
    item = runs(1, 0, name="study", arguments=Arguments(command="tune"))
    return dataclasses.replace(item, **{"device_s": 300.0, "charged_until": NOW, **changes})


def test_an_item_that_has_said_nothing_or_is_not_opened_yet_is_not_known(records: Records) -> None:
    progress = item_progress(records, lambda _: "")
    assert progress(running(), NOW) is None
    opened(records, now=NOW)
    assert progress(running(arguments=Arguments(command="train")), NOW) is None
    records.close()


def test_finished_trials_and_the_steps_of_others_count(records: Records) -> None:
    study = opened(records, now=NOW, num_trials=4)
    progress = item_progress(records, lambda _: "")
    first = progress(running(), NOW)
    assert first is not None
    assert (first.share, first.ends_at) == (0.0, None)
    study.ask(now=NOW)
    start(study, 0)
    study.record(evaluation(0, 1, 1), now=NOW)
    quarter = progress(running(), NOW + 20.0)
    assert quarter is not None
    assert quarter.share == pytest.approx(1 / 16)
    assert quarter.ends_at == pytest.approx(NOW + 20.0 + 320.0 * 15)
    study.end_attempt(end(0, 1), TrialState.COMPLETED, now=NOW)
    done = progress(running(), NOW)
    assert done is not None
    assert done.share == pytest.approx(1 / 4)
    assert done.ends_at == pytest.approx(NOW + 900.0)
    records.close()


TRAIN = """run best
trial 0 step 50/200, eval_loss 1.2
trial 0 step 100/200, eval_loss 1.1, loss 1.0
best so far: trial 0, 1.1 at step 100
"""
EVALUATE = "scoring base (1 of 4)\nbase 1.2\nscoring a (b) (2 of 4)\n"
SAID = [
    ("train", TRAIN, 0.5, NOW + 320.0),  # as long again as it has run, over all starts
    ("train", "Reading best.yaml\n", None, None),
    ("evaluate", EVALUATE, 0.25, NOW + 300.0),  # three times what this start has taken
    ("evaluate", "scoring base (1 of 4)\n", 0.0, None),
    ("evaluate", "", None, None),
]


@pytest.mark.parametrize(("command", "text", "share", "ends_at"), SAID)
def test_a_single_run_is_as_far_as_it_says(
    records: Records, command: str, text: str, share: float | None, ends_at: float | None
) -> None:
    item = running(arguments=Arguments(command=command), started_at=NOW - 100.0, charged_until=NOW - 20.0)
    found = item_progress(records, lambda _: text)(item, NOW)
    assert (None if found is None else found.share) == share
    assert (None if found is None else found.ends_at) == ends_at
    records.close()


def test_what_an_earlier_start_said_does_not_count(tmp_path: Path) -> None:
    path = log_path(tmp_path, 3)
    path.parent.mkdir(parents=True)
    path.write_text(f"{START}1, now\nerror: old\ntrial 0 step 9/10,\n{START}2, now\ntrial 0 step 2/10,\n")
    assert present_words(tmp_path, 3) == "trial 0 step 2/10,"
    assert present_words(tmp_path, 4) == ""
