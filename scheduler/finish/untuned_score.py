"""Scores the model as it is before tuning, once per study, so that every trial can be compared with it.

An evaluation of its own before the first trial, not the default trial's at step 0: an adapter need not begin
as no change (`--adapter-start`), studies of earlier versions whose default trial is over get it too when
they are gone on with, and no trial's time or memory is another one's for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from autosft.scheduler.decide.history import pinned_for
from autosft.scheduler.events import NewBest, Note, Observer, StudyEvent, TrialMeasured, UntunedScored
from autosft.scheduler.finish.evaluations import Evaluation, on_one_device, run_evaluations
from autosft.studies.files.checkpoints import untuned_dir, untuned_url
from autosft.studies.files.study_folder import bring_here
from autosft.studies.results.over_untuned import difference_between
from autosft.studies.trial import UNTUNED_TRIAL, Measurement, Task, TrialJob
from autosft.studies.values import UntunedScore

if TYPE_CHECKING:
    from autosft.scheduler.setup.open_study import OpenStudy


def score_untuned(study: OpenStudy, *, observe: Observer, stop_requested: Callable[[], bool]) -> None:
    """Evaluate the untuned model as trials are evaluated and record it, unless an earlier run has.

    Does nothing once the user wants to leave.  Where it cannot be evaluated, that is said, the study goes on
    without, and the next run of the study tries again.
    """
    if study.records.untuned() is not None or stop_requested():
        return
    observe(Note(message="Scoring the untuned model, on the examples that trials are compared on."))

    def keep(event: Measurement) -> None:
        score = UntunedScore(
            metrics=event.metrics, duration_s=event.elapsed_s, recorded_at=study.runner.now()
        )
        study.records.keep_untuned(score)
        value = score.metric(study.run.metric)
        if value is not None:
            observe(UntunedScored(metric=study.run.metric, value=value))

    job = untuned_job(study)
    evaluation = Evaluation(
        job=job,
        name="the untuned model",
        skipped="Not scored",
        keep=keep,
        after="The untuned model is scored after that.",
    )
    deadline = study.run.deadline

    def is_over() -> bool:
        return stop_requested() or (deadline is not None and study.runner.now() >= deadline)

    run_evaluations(study, [evaluation], observe=observe, stop_requested=is_over)
    bring_here(study.run.store_url, study.run.output_dir)


def untuned_job(study: OpenStudy) -> TrialJob:
    """Return the evaluation of the untuned model as a job, capped like the default configuration."""
    run, plan = study.run, study.default.plan
    return TrialJob(
        study=run.name,
        trial=UNTUNED_TRIAL,
        attempt=1,
        model=run.model,
        data_dir=run.data_dir,
        output_dir=str(untuned_dir(run.output_dir)),
        settings=study.default.settings,
        pinned=pinned_for(run.pinned, plan),
        plan=on_one_device(plan),
        device_uuids=(),
        resume_from=None,
        save_resume_state=False,
        trust_remote_code=run.trust_remote_code,
        scoring=None if run.scoring is None else replace(run.scoring, incumbent=None),
        task=Task.UNTUNED,
        store_url=None if run.store_url is None else untuned_url(run.store_url),
    )


class AgainstUntuned:
    """Tells an observer of each new best also how it compares with the untuned model."""

    def __init__(self, study: OpenStudy, observe: Observer) -> None:
        self._study, self._observe = study, observe
        self._evaluations: dict[tuple[int, int], int] = {}  # by trial and step

    def __call__(self, event: StudyEvent) -> None:
        if isinstance(event, TrialMeasured):
            measured = event.measurement
            if measured.evaluation is not None:
                self._evaluations[measured.trial, measured.step] = measured.evaluation
        if isinstance(event, NewBest):
            event = self._compared(event)
        self._observe(event)

    def _compared(self, event: NewBest) -> NewBest:
        run, evaluation = self._study.run, self._evaluations.get((event.trial, event.step))
        if evaluation is None:
            return event
        bring_here(run.store_url, run.output_dir)
        found = difference_between(run.output_dir, event.trial, evaluation, metric=run.metric)
        return replace(event, over_untuned=found)
