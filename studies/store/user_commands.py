"""What users may ask of a study that runs in another process: checked before it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autosft.profiles.errors import UserError
from autosft.studies.search.dimensions import Fixed
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.space import complete
from autosft.studies.store.driver_lease import HEARTBEAT_TIMEOUT_S
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.values import CommandKind, StudyOverview


def is_alive(overview: StudyOverview, *, now: float) -> bool:
    """Whether a process is running the study, judged by its heartbeat."""
    if overview.driver is None or overview.heartbeat_at is None:
        return False
    return now - overview.heartbeat_at < HEARTBEAT_TIMEOUT_S


def require_possible(kind: CommandKind, study: StudyRecords, trial: int | None, *, is_running: bool) -> None:
    """Raise UserError for a command that cannot be carried out."""
    name, trials = study.spec.name, study.trials()
    if trial is None:
        if not is_running and kind is not CommandKind.ENQUEUE:
            raise UserError(
                f"Study {name!r} is not running, so there is nothing to {kind.value}.",
                remedy="Run its autosft tune command again to resume it.",
            )
        return
    if trial >= len(trials):
        raise UserError(
            f"Study {name!r} has no trial {trial}; its trials are 0 to {len(trials) - 1}."
            if trials
            else f"Study {name!r} has no trials yet."
        )
    if trials[trial].state.is_over:
        raise UserError(f"Trial {trial} of study {name!r} is over: it is {trials[trial].state.value}.")


def checked_settings(study: StudyRecords, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's settings as values of the study's search space.  Raises UserError."""
    if not values:
        raise UserError(
            "No settings were given.", remedy="Give at least one setting, such as --learning-rate 3e-4."
        )
    given = {}
    for name, text in values.items():
        dimension = parse_dimension(name, text)
        if not isinstance(dimension, Fixed):
            raise UserError(f"--{name.replace('_', '-')} {text}: a trial takes a single value.")
        given[name] = dimension.value
    complete(study.spec.space, given)
    return given
