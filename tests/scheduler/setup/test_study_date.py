"""A study is gone on with by the date of its first day, under its name or found again by what it is about."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from autosft.scheduler.setup.template_date import dated, known_dates, local_date
from autosft.studies.request import TuneRequest
from autosft.studies.store.records import open_records
from tests.studies.study_examples import spec

MADE_AT = 1_764_500_000.0


@pytest.fixture
def storage_url(tmp_path: Path) -> str:
    """A database with studies of two dates, one asked for, and one of a version that kept none."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    records = open_records(url)
    made = [
        ("named", "1" * 64, {"template_date": "2026-11-30"}, {}),
        ("asked", "2" * 64, {"template_date": "2020-01-01"}, {"template_date": "2020-01-01"}),
        ("old", "3" * 64, None, {}),
    ]
    for age, (name, fingerprint, options, goal) in enumerate(made):
        study = replace(
            spec(), name=name, data_fingerprint=fingerprint, data_options=options, environment={"goal": goal}
        )
        records.open_study(study, now=MADE_AT - age)
    records.close()
    return url


CASES = [
    pytest.param({"study": "named"}, {"1": "2026-11-30"}, id="by its name"),
    pytest.param({"study": "asked"}, {"2": "2020-01-01"}, id="by its name, with a date that was asked for"),
    pytest.param({"study": "old"}, {"3": "made"}, id="of an earlier version: the day on which it was made"),
    pytest.param({"study": "new"}, {}, id="a new one"),
    pytest.param({}, {"1": "2026-11-30", "3": "made"}, id="without a name: where nobody asked for one"),
]


@pytest.mark.parametrize(("given", "found"), CASES)
def test_dates_of_studies(given: dict[str, str], found: dict[str, str], storage_url: str) -> None:
    request = TuneRequest(model="m", data="d", **given)
    dates = {fingerprint[0]: date for fingerprint, date in known_dates(request, storage_url)}
    made = time.strftime("%Y-%m-%d", time.localtime(MADE_AT - 2))
    assert dates == {key: made if date == "made" else date for key, date in found.items()}


def test_without_a_database_there_are_none(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'none.db'}"
    assert known_dates(TuneRequest(model="m", data="d"), url) == ()
    assert not (tmp_path / "none.db").exists()


def test_the_date_is_the_local_one() -> None:
    assert local_date(MADE_AT) == time.strftime("%Y-%m-%d", time.localtime(MADE_AT))


@pytest.mark.parametrize("given", ["2026-11-30", None])
def test_a_request_takes_a_date_as_yaml_has_it(given: str | None) -> None:
    import datetime

    assert TuneRequest(template_date=given).template_date == given
    read = datetime.date(2026, 11, 30)  # YAML's own type
    assert TuneRequest.model_validate({"template_date": read}).template_date == "2026-11-30"


def test_only_a_date_that_was_written_is_kept() -> None:
    from types import SimpleNamespace

    assert dated(SimpleNamespace(template_date=None)) == {}  # type: ignore[arg-type]
    assert dated(SimpleNamespace(template_date="2026-11-30")) == {"template_date": "2026-11-30"}  # type: ignore[arg-type]
