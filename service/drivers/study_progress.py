"""How far a study is, from its own records in the database."""

from __future__ import annotations

from collections.abc import Callable

from autosft.profiles.errors import UserError
from autosft.service.drivers.protocol import Progress
from autosft.service.values import Item
from autosft.studies.store.records import Records, StudyRecords
from autosft.studies.trial import TrialState

#: Share of a study from which on its own pace is believed instead of the prediction.
MIN_SHARE = 0.05


def study_progress(records: Records) -> Callable[[Item, float], Progress | None]:
    """Return the function that tells how far the study of an item is.

    None for items other than studies, and until the study is in the database.
    """

    def progress(item: Item, now: float) -> Progress | None:
        if item.arguments.command != "tune":
            return None
        try:
            study = records.read_study(item.name)
        except UserError:  # not opened yet
            return None
        share = done_share(study)
        return Progress(share=share, ends_at=_end(item, share, now))

    return progress


def done_share(study: StudyRecords) -> float:
    """Return the share of a study's trials that is trained, those that run or are paused by their steps."""
    done = 0.0
    for trial in study.trials():
        if trial.state.is_finished:
            done += 1.0
        elif trial.state in (TrialState.RUNNING, TrialState.PAUSED, TrialState.WAITING):
            last = study.progress(trial.number)[-1:]
            done += sum(one.step / max(1, one.num_steps) for one in last)
    return min(1.0, done / max(1, study.spec.num_trials))


def _end(item: Item, share: float, now: float) -> float | None:
    """Return when a running item ends at the pace that it has had, over all its starts."""
    if share < MIN_SHARE or item.place is None or item.charged_until is None:
        return None
    ran_s = item.device_s / max(1e-9, item.place.rate) + max(0.0, now - item.charged_until)
    return now + ran_s * (1.0 - share) / share
