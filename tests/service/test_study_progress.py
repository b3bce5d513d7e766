"""How far a study is and when it ends, from its records."""

from __future__ import annotations

import dataclasses

import pytest

from autosft.service.drivers.study_progress import study_progress
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


def test_an_item_that_is_no_study_or_not_opened_yet_is_not_known(records: Records) -> None:
    progress = study_progress(records)
    assert progress(running(), NOW) is None
    opened(records, now=NOW)
    assert progress(running(arguments=Arguments(command="train")), NOW) is None
    records.close()


def test_finished_trials_and_the_steps_of_others_count(records: Records) -> None:
    study = opened(records, now=NOW, num_trials=4)
    progress = study_progress(records)
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
