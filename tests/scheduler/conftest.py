"""Records without a sampler's seconds, for tests of the loop: what is proposed does not matter to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from autosft.studies.search.dimensions import Value
from autosft.studies.search.space import SearchSpace, default_parameters
from autosft.studies.store import study_records
from autosft.studies.trial import TrialRecord
from tests.scheduler.exported_config import cache, config, data, home

__all__ = ("cache", "config", "data", "database", "home", "quick_records")


def propose(space: SearchSpace, trials: Sequence[TrialRecord], **_: Any) -> dict[str, Value]:
    """Return the defaults with a learning rate that no trial has had."""
    parameters = default_parameters(space)
    return {**parameters, "learning_rate": 1e-6 * (len(trials) + 1)}


@pytest.fixture
def quick_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask without a model, and leave Optuna's tables alone."""
    monkeypatch.setattr(study_records, "propose", propose)
    monkeypatch.setattr(study_records.StudyRecords, "_project", lambda self: None)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Return where a study database may be made."""
    return tmp_path / "studies.db"
