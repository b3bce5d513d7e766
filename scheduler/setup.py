"""From a request to a study that can run: hardware, model, data, plan, database, runner.

`open_study` is the one place where the parts are put together; `tuning.run_study` only uses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from autosft.scheduler.events import Observer
from autosft.scheduler.tuning import LeaseBroker, StudyRun
from autosft.studies.records import StudyRecords
from autosft.studies.request import TuneRequest
from autosft.workers.runner import TrialRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenStudy:
    """A study with everything that running it needs; valid inside `open_study`."""

    run: StudyRun
    records: StudyRecords
    runner: TrialRunner
    leases: LeaseBroker


@contextmanager
def open_study(request: TuneRequest, *, observe: Observer) -> Iterator[OpenStudy]:
    """Prepare a study and its runner; end every process of ours on the way out.

    Tells `observe` what is being done (`Note`) and at last what was planned (`StudyOpened`).  Raises
    UserError for whatever the request gets wrong, before anything is written to the database.
    """
    raise NotImplementedError
    yield
