"""`--target METRIC=VALUE`: whether the target is reached beyond chance, which ends the study."""

from __future__ import annotations

from autosft.scheduler.study_run import StudyRun
from autosft.studies.files.study_folder import bring_here
from autosft.studies.metrics import Evidence, find_metric
from autosft.studies.results.losses import losses_of
from autosft.studies.trial import Measurement


def passes_target(run: StudyRun, measurement: Measurement) -> bool:
    """Whether the worse end of an evaluation's 95 % interval is as good as the study's target.

    False without a target, for a report that is not an evaluation, and if the per-example losses, and
    therefore the interval, are not available.
    """
    value = measurement.metric(run.metric)
    if run.target is None or measurement.evaluation is None or value is None:
        return False
    if (value > run.target) if run.minimize else (value < run.target):
        return False
    ends = _interval(run, measurement, value)
    if ends is None:
        return False
    low, high = ends
    return high <= run.target if run.minimize else low >= run.target


def _interval(run: StudyRun, measurement: Measurement, value: float) -> tuple[float, float] | None:
    metric = find_metric(run.metric)
    if metric.evidence is Evidence.PROMPTS:
        found = metric.share_interval(value, int(measurement.metric(metric.count_name) or 0))
    else:
        assert measurement.evaluation is not None
        bring_here(run.store_url, run.output_dir)
        losses = losses_of(run.output_dir, measurement.trial, measurement.evaluation)
        found = None if losses is None else metric.interval(losses)
    return None if found is None else (found.low, found.high)
