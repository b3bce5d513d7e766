"""How far an item is: a study from its records in the database, a single run from what it has printed."""

from __future__ import annotations

import re
from collections.abc import Callable

from autosft.profiles.errors import UserError
from autosft.service.drivers.protocol import Progress
from autosft.service.values import Item
from autosft.studies.store.records import Records, StudyRecords
from autosft.studies.trial import TrialState

#: Share of an item from which on its own pace is believed instead of the prediction.
MIN_SHARE = 0.05


#: Of `train`: "trial 0 step 51/201"; of `evaluate`, as it begins with a model: "scoring mine (2 of 3)".
_STEP = re.compile(r"^trial \d+ step (\d+)/(\d+),", re.MULTILINE)
_SCORING = re.compile(r"^scoring .* \((\d+) of (\d+)\)$", re.MULTILINE)


def item_progress(records: Records, words: Callable[[int], str]) -> Callable[[Item, float], Progress | None]:
    """Return the function that tells how far an item is; None where that is not known yet.

    `words` returns the end of what an item has printed since its present start.
    """

    def progress(item: Item, now: float) -> Progress | None:
        match item.arguments.command:
            case "train":  # goes on from its checkpoints: its steps count over all starts
                share = _last_share(_STEP, words(item.id), is_begun=False)
                return None if share is None else Progress(share=share, ends_at=_end(item, share, now))
            case "evaluate":  # begins again
                share = _last_share(_SCORING, words(item.id), is_begun=True)
                ran_s = now - (item.started_at or now)
                return None if share is None else Progress(share=share, ends_at=_at_pace(ran_s, share, now))
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


def _last_share(pattern: re.Pattern[str], text: str, *, is_begun: bool) -> float | None:
    """Return which part is done by the last line of a kind; one that tells of a beginning counts from 0."""
    found = pattern.findall(text)
    if not found:
        return None
    done, total = map(int, found[-1])
    return min(1.0, max(0, done - is_begun) / max(1, total))


def _end(item: Item, share: float, now: float) -> float | None:
    """Return when a running item ends at the pace that it has had, over all its starts."""
    if item.place is None or item.charged_until is None:
        return None
    ran_s = item.device_s / max(1e-9, item.place.rate) + max(0.0, now - item.charged_until)
    return _at_pace(ran_s, share, now)


def _at_pace(ran_s: float, share: float, now: float) -> float | None:
    return None if share < MIN_SHARE else now + ran_s * (1.0 - share) / share
