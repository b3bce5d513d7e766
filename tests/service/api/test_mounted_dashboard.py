"""Optuna's dashboard below the service: for admins alone, on the studies of its own database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autosft.commands.serve import dashboard_of
from autosft.service.api.dashboard import PATHS
from tests.service.api.fakes import ADA, ROOT, client, served, tokens
from tests.studies.study_examples import opened

pytestmark = pytest.mark.slow


def test_it_shows_its_studies_to_admins_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/studies.db"
    made: list[Any] = []

    def dashboard() -> Any:
        made.append(dashboard_of(url))
        return made[-1]

    with served(tmp_path, url=url, dashboard=dashboard) as service:
        opened(service.records, name="first")
        known = tokens(service, ADA, ROOT)
        for path in PATHS:
            assert client(service).get(path).status_code == 401, path
            assert client(service, known["ada"]).get(path).status_code == 403, path
        assert not made  # nobody who may not see it has it imported
        as_root = client(service, known["root"])
        page = as_root.get("/dashboard")
        assert page.status_code == 200, page.text
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
        shown = as_root.get("/api/studies").json()
        names = [study["study_name"] for study in shown["study_summaries"]]
        assert names == ["first"]
        assert len(made) == 1
