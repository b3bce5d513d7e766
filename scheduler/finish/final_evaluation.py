"""Evaluates the best checkpoints on examples that no choice has seen, before the winner is named.

Each is evaluated by a process of its own on a device of the study, leased and capped like its training,
which needs more.  Checkpoints that were evaluated on these examples before are not evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autosft.scheduler.decide.history import pinned_for
from autosft.scheduler.decide.self_measuring import capped_at_peak
from autosft.scheduler.events import Note, Observer
from autosft.scheduler.finish.evaluations import Evaluation, on_one_device, run_evaluations
from autosft.studies.files.checkpoints import ranked, score_path, trial_dir, trial_url
from autosft.studies.files.remote import is_url
from autosft.studies.files.study_folder import bring_here
from autosft.studies.metrics import Evidence, find_metric
from autosft.studies.results.final_scores import FinalScore, Scored, final_scores, interval_of
from autosft.studies.results.losses import read_losses
from autosft.studies.trial import Measurement, Task, TrialJob
from autosft.studies.values import CheckpointRecord, CheckpointScore

if TYPE_CHECKING:
    from autosft.scheduler.setup.open_study import OpenStudy

#: At most so many of the kept checkpoints are evaluated.
MAX_CANDIDATES = 3
#: Name of these examples in the database.
FINAL = "final"


def score_best(study: OpenStudy, *, observe: Observer, stop_requested: Callable[[], bool]) -> None:
    """Evaluate the best kept checkpoints on the final examples and record their scores.

    Does nothing once the user wants to leave.  What cannot be evaluated is reported and left out.
    """
    bring_here(study.run.store_url, study.run.output_dir)
    missing = [candidate for candidate in candidates(study) if not score_file(study, candidate).is_file()]
    if find_metric(study.run.metric).evidence is Evidence.PROMPTS:  # which are not split
        return
    if not missing or study.data.final.num_examples == 0 or stop_requested():
        return
    observe(
        Note(
            message=f"Evaluating the best checkpoints ({len(missing)}) again, on "
            f"{study.data.final.num_examples:,} examples that were not used to choose."
        )
    )
    evaluations = [
        evaluation_of(study, candidate, number) for number, candidate in enumerate(missing, start=1)
    ]
    run_evaluations(study, evaluations, observe=observe, stop_requested=stop_requested)


def candidates(study: OpenStudy) -> list[CheckpointRecord]:
    """Return the kept checkpoints that may win, the best first."""
    records = study.records
    found = ranked(records.checkpoints(), records.trials(), maximize=not study.run.minimize)
    return found[: min(study.run.keep_best, MAX_CANDIDATES)]


def evaluation_of(study: OpenStudy, checkpoint: CheckpointRecord, number: int) -> Evaluation:
    """Return the evaluation of a checkpoint, whose scores are recorded."""
    job = job_for(study, checkpoint, number)
    return Evaluation(
        job=job,
        name=f"trial {checkpoint.trial} step {checkpoint.step}",
        skipped="Not evaluated again",
        after="The best checkpoints are evaluated after that.",
        keep=lambda event: study.records.add_scores(scores_of(study, checkpoint, event)),
    )


def job_for(study: OpenStudy, checkpoint: CheckpointRecord, number: int) -> TrialJob:
    """Return the evaluation of a checkpoint as a job, on no device yet."""
    run, trial = study.run, study.records.trial(checkpoint.trial)
    assert trial.plan is not None, "a trial with a checkpoint has run"
    plan = capped_at_peak(trial.plan, trial.measurements)
    return TrialJob(
        study=run.name,
        trial=trial.number,
        attempt=number,
        model=run.model,
        data_dir=run.data_dir,
        output_dir=str(trial_dir(run.output_dir, trial.number) / FINAL),
        settings=trial.settings,
        pinned=pinned_for(run.pinned, plan),
        plan=on_one_device(plan),
        device_uuids=(),
        resume_from=checkpoint.path,
        save_resume_state=False,
        trust_remote_code=run.trust_remote_code,
        task=Task.SCORE,
        store_url=None if run.store_url is None else f"{trial_url(run.store_url, trial.number)}/{FINAL}",
    )


def score_file(study: OpenStudy, checkpoint: CheckpointRecord) -> Path:
    """Return the file of this machine with a checkpoint's losses on the final examples."""
    if not is_url(checkpoint.path):
        return score_path(Path(checkpoint.path))
    name = checkpoint.path.rpartition("/")[2]
    return trial_dir(study.run.output_dir, checkpoint.trial) / FINAL / f"{name}.json"


def scores_of(study: OpenStudy, checkpoint: CheckpointRecord, event: Measurement) -> list[CheckpointScore]:
    """Return the scores to record of an evaluation: the study's metric and the second metric."""
    path = score_file(study, checkpoint)
    bring_here(study.run.store_url, study.run.output_dir)
    losses = read_losses(path) if path.is_file() else None
    found = []
    for metric in dict.fromkeys((study.run.metric, study.request.final_metric or study.run.metric)):
        value = event.metric(metric)
        if value is None:
            continue
        interval = None if losses is None else interval_of(losses, metric)
        found.append(
            CheckpointScore(
                trial=checkpoint.trial,
                step=checkpoint.step,
                examples=FINAL,
                metric=metric,
                value=value,
                low=None if interval is None else interval.low,
                high=None if interval is None else interval.high,
                num_examples=None if interval is None else interval.num_examples,
                recorded_at=study.runner.now(),
            )
        )
    return found


def read_final_scores(study: OpenStudy) -> Sequence[FinalScore]:
    """Return how the candidates compare on the final examples, the winner first; empty if it has no score."""
    scored = [
        Scored(trial=candidate.trial, step=candidate.step, losses=read_losses(path))
        for candidate in candidates(study)
        if (path := score_file(study, candidate)).is_file()
    ]
    best = candidates(study)[:1]
    if not scored or (scored[0].trial, scored[0].step) != (best[0].trial, best[0].step):
        return ()
    return final_scores(scored, metric=study.run.metric, second_metric=study.request.final_metric)
