"""The conclusion of a study: the best trial, its gain, what to do next."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autosft.profiles.dataset.prepared import tokens_fingerprint
from autosft.profiles.masking import masked, masked_command
from autosft.scheduler.decide.no_result import why_no_result
from autosft.scheduler.finish.final_evaluation import read_final_scores
from autosft.studies.export import exported, write_config
from autosft.studies.files.checkpoints import prompt_scores_path, trial_dir
from autosft.studies.files.remote import fetched
from autosft.studies.files.study_folder import bring_here
from autosft.studies.intervals import Interval
from autosft.studies.metrics import Evidence, find_metric
from autosft.studies.results.final_scores import FinalScore, describe_choice
from autosft.studies.results.losses import losses_of, read_passes
from autosft.studies.results.outlook import describe_going_on, outlook_of, rules_of
from autosft.studies.results.over_untuned import OverUntuned, describe_over_untuned, over_untuned
from autosft.studies.results.racing import describe_difference
from autosft.studies.results.summary import Summary, best_measurement, describe_gain, summarise
from autosft.studies.trial import StopReason, TrialRecord
from autosft.workers.processes.starters import call

if TYPE_CHECKING:
    from autosft.scheduler.setup.open_study import OpenStudy
    from autosft.scheduler.study_run import Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """The end of `autosft tune`, ready to be shown or written as JSON."""

    study: str
    metric: str
    minimize: bool
    num_finished: int
    num_trials: int
    is_complete: bool  # all trials that were asked for are finished
    best_trial: int | None  # None when no trial has been evaluated
    best_value: float | None
    best_step: int | None
    best_checkpoint: str | None  # a model folder for AutoModelForCausalLM.from_pretrained, or its URL
    best_parameters: tuple[tuple[str, float | int | str], ...]
    best_yaml: Path | None  # for `autosft train`
    gain: str  # a sentence: over the default configuration, with its uncertainty; a tie is called a tie
    choice: str  # a sentence: the best checkpoint, its ties, its score on examples not used to choose
    final_scores: tuple[FinalScore, ...]  # of the best checkpoints on those examples, the winner first
    answers: str | None  # demo: share of held-out instructions answered correctly, untuned and best
    storage_url: str
    dashboard_command: str
    resume_command: str
    duration_s: float
    notes: tuple[str, ...] = ()
    num_cut: int = 0  # of the finished trials, those that the time budget has ended
    no_result: str = ""  # why no trial has one and what helps, where the study is over or out of time
    untuned_value: float | None = None  # of the model as it was before tuning, on the same examples
    going_on: str = ""  # whether more search is worth it, where a freeze-thaw search can tell
    over_untuned: OverUntuned | None = None  # the best checkpoint beside it, paired; None: not scored
    # Measured: how long devices were idle between two attempts while work was waiting.
    num_gaps: int = 0
    idle_s: float = 0.0  # in all
    median_gap_s: float | None = None
    sharing_overhead: float | None = None  # measured cost of sharing a GPU, as a factor; None: not shared


def conclude(study: OpenStudy, tally: Tally) -> Conclusion:
    """Find the best checkpoint of a study, write `best.yaml`, and say what the search has gained.

    In the demo, the untuned and the best model also answer instructions that no trial has seen.
    """
    run, records = study.run, study.records
    bring_here(run.store_url, run.output_dir)
    trials = records.trials()
    summary = summarise(
        trials,
        lambda trial, evaluation: losses_of(run.output_dir, trial, evaluation),
        metric=run.metric,
        maximize=not run.minimize,
    )
    best = summary.best
    finals = tuple(read_final_scores(study))
    best_yaml = None
    if best is not None:
        best_yaml = run.output_dir / "best.yaml"
        tokens = tokens_fingerprint(study.data, best.settings.max_rounds)
        write_config(best_yaml, exported(records.spec, best, tokens_fingerprint=tokens))
    checkpoint = None if best is None else best.best_checkpoint
    untuned = records.untuned()
    over = over_untuned(run.output_dir, untuned, best, metric=run.metric)
    records.show_in_dashboard("over the untuned model", describe_over_untuned(over))
    storage = masked(study.storage_url)
    is_given = study.request.storage is not None
    return Conclusion(
        study=run.name,
        metric=run.metric,
        minimize=run.minimize,
        num_finished=records.num_finished(),
        num_trials=run.num_trials,
        is_complete=records.num_finished() >= run.num_trials,
        best_trial=None if best is None else best.number,
        best_value=None if best is None else best.value,
        best_step=None if best is None else best.best_step,
        best_checkpoint=checkpoint,
        best_parameters=() if best is None else best.parameters,
        best_yaml=best_yaml,
        num_cut=sum(
            attempt.outcome == StopReason.BUDGET.value and trials[attempt.trial].state.is_finished
            for attempt in records.attempts()
        ),
        no_result=""
        if best is not None or tally.was_stopped or tally.paused_trials
        else why_no_result(trials, is_time_over=is_time_over(study)),
        untuned_value=None if untuned is None else untuned.metric(run.metric),
        over_untuned=over,
        going_on=worth_of_going_on(study, trials),
        gain=describe_gain(summary) if run.scoring is None else prompts_gained(summary, run.output_dir),
        choice=choice_of(study, summary, finals),
        final_scores=finals,
        answers=demo_answers(study, checkpoint) if study.demo_examples and checkpoint else None,
        storage_url=storage,
        dashboard_command="autosft dashboard" + (f" --storage {shlex.quote(storage)}" if is_given else ""),
        resume_command=f"autosft {masked_command(sys.argv[1:])}",
        duration_s=time.time() - study.started_at,
        num_gaps=tally.num_gaps,
        idle_s=tally.idle_s,
        median_gap_s=tally.median_gap_s,
        sharing_overhead=tally.overhead,
    )


def worth_of_going_on(study: OpenStudy, trials: Sequence[TrialRecord]) -> str:
    """Say what more trials are expected to gain; empty where no model of learning curves decides."""
    if not study.run.rule.thaws:
        return ""
    return describe_going_on(outlook_of(rules_of(study.records.spec), trials).going_on)


def is_time_over(study: OpenStudy) -> bool:
    return study.run.deadline is not None and study.runner.now() >= study.run.deadline


def prompts_gained(summary: Summary, output_dir: Path) -> str:
    """Say how many more prompts the best trial follows than the default configuration."""
    best, default = summary.best, summary.default
    if best is None or default is None or best.number == default.number:
        return describe_gain(summary)
    ours, theirs = (passes_of(trial, output_dir) for trial in (best, default))
    against = f"{summary.metric} {best.value:.4g} against {default.value:.4g} of the default configuration"
    if ours is None or theirs is None:  # abandoned early, or its file is gone
        return f"{against}; one of them was estimated from a lost race, so no test is made."
    return f"{against}: {describe_difference(ours, theirs)}."


def passes_of(trial: TrialRecord, output_dir: Path) -> tuple[bool, ...] | None:
    """Return which prompts a trial's best checkpoint followed; None where some are not known."""
    at = best_measurement(trial)
    if at is None or at.evaluation is None:
        return None
    return read_passes(prompt_scores_path(trial_dir(output_dir, trial.number), at.evaluation))


def choice_of(study: OpenStudy, summary: Summary, finals: Sequence[FinalScore]) -> str:
    """Say which checkpoint is the best, what it is tied with, and how it scores on fresh examples."""
    return describe_choice(
        summary.ranking,
        interval_of_winner(study, summary),
        finals,
        metric=study.run.metric,
        second_metric=study.request.final_metric,
    )


def interval_of_winner(study: OpenStudy, summary: Summary) -> Interval | None:
    """Return the interval of the metric of the best checkpoint; None without one or without its files."""
    if not summary.ranking:
        return None
    first, output_dir = summary.ranking[0], study.run.output_dir
    metric = find_metric(study.run.metric)
    if metric.evidence is Evidence.PROMPTS:
        passes = read_passes(prompt_scores_path(trial_dir(output_dir, first.trial), first.evaluation))
        return None if passes is None else metric.share_interval(sum(passes) / len(passes), len(passes))
    losses = losses_of(output_dir, first.trial, first.evaluation)
    return None if losses is None else metric.interval(losses)


def demo_answers(study: OpenStudy, checkpoint: str) -> str | None:
    """Say how many held-out instructions the untuned and the best model answer exactly."""
    from autosft.profiles.dataset.demo import is_correct

    examples = study.demo_examples
    questions = [example["messages"][:-1] for example in examples]

    def num_right(model: str) -> int:
        texts = call(
            study.starter,
            "autosft.workers.scoring.inference_server:answer",
            {"model": model, "conversations": questions, "max_new_tokens": 24},
            num_threads=1,
            log=study.run.output_dir / "answers.log",
        )
        return sum(is_correct(example, text) for example, text in zip(examples, texts, strict=True))

    with ThreadPoolExecutor() as side_by_side:
        untuned, best = side_by_side.map(num_right, (study.run.model, str(fetched(checkpoint))))
    share = len(examples) / 100
    return (
        f"{best / share:.0f} % of {len(examples)} held-out instructions answered exactly right, "
        f"{untuned / share:.0f} % before tuning"
    )


__all__ = ["Conclusion", "conclude"]
