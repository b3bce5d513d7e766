"""The date that a study's chat template writes as today's: the study's own when it is resumed."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from pathlib import Path

from autosft.profiles.dataset.prepared import PreparedData
from autosft.studies.request import TuneRequest
from autosft.studies.store.database import parse_url
from autosft.studies.store.records import open_records


def dated(data: PreparedData) -> dict[str, str]:
    """Return the date that a chat template wrote as today's, as an option of `prepare`; empty without one."""
    return {} if data.template_date is None else {"template_date": data.template_date}


def known_dates(request: TuneRequest, storage_url: str) -> tuple[tuple[str, str], ...]:
    """Return (data fingerprint, template's date) of the study to resume, or of those it may be.

    A study without a name is identified by its inputs, which have to give the same tokens; only studies whose
    date the user did not choose are considered.  Studies of versions that stored no date were rendered on the
    day on which they were created.
    """
    if not is_there(storage_url):
        return ()
    with closing(open_records(storage_url)) as records:
        studies = [(study.spec, study.created_at) for study in records.studies()]
    return tuple(
        (spec.data_fingerprint, (spec.data_options or {}).get("template_date") or local_date(made_at))
        for spec, made_at in studies
        if request.study == spec.name
        or (request.study is None and "template_date" not in spec.environment.get("goal", {}))
    )


def is_there(storage_url: str) -> bool:
    """Whether a database exists; one on a server is contacted when it is used."""
    parsed = parse_url(storage_url)
    return parsed.get_backend_name() != "sqlite" or Path(parsed.database or "").exists()


def local_date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).date().isoformat()  # noqa: DTZ006 - as it was rendered
