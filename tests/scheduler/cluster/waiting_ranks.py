"""A training function whose ranks meet and then wait until they are asked to stop."""

from __future__ import annotations

from collections.abc import Callable

from autosft.studies.trial import AttemptEnd, Measurement, StopReason, TrialJob
from autosft.workers.device import device_of
from autosft.workers.ranks import join
from tests.workers import scripted


def train(
    job: TrialJob, report: Callable[[Measurement], None], stop_requested: Callable[[], StopReason | None]
) -> AttemptEnd:
    join(job, device_of(job)).wait()
    return scripted.train(job, report, stop_requested)
