"""The contents of a report, as values and sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from autosft.profiles.units import gib
from autosft.studies.formatting import format_duration, format_metric
from autosft.studies.report.followed import FollowedPrompt, followed_prompts
from autosft.studies.results.losses import losses_of
from autosft.studies.results.outlook import Outlook, describe_going_on, outlook_of, rules_of
from autosft.studies.results.over_untuned import OverUntuned, describe_over_untuned, over_untuned
from autosft.studies.results.summary import (
    Summary,
    best_measurement,
    describe_gain,
    describe_ranking,
    peak_bytes,
    summarise,
)
from autosft.studies.search.importance import importances
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import Measurement, TrialRecord, TrialState
from autosft.studies.values import AttemptRecord, CheckpointScore, Direction, StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An example of the evaluation set, and the models' answers to it."""

    prompt: str
    expected: str
    answers: tuple[tuple[str, str], ...]  # (name of the model, its answer)
    turns: tuple[tuple[str, str], ...] = ()  # the prompt as (role, text), if its template marks roles


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReport:
    """The contents of a study's report."""

    spec: StudySpec
    trials: tuple[TrialRecord, ...]
    attempts_by_trial: Mapping[int, tuple[AttemptRecord, ...]]
    summary: Summary
    importances: tuple[tuple[str, float], ...]  # empty if there are too few trials
    training: tuple[tuple[int, tuple[Measurement, ...]], ...]  # all reports of the best and the default trial
    answers: tuple[Answer, ...]
    database: str
    written_at: float  # UNIX seconds
    scores: tuple[CheckpointScore, ...] = ()  # on examples that were not used to choose
    untuned: float | None = None  # the metric of the model before tuning
    over_untuned: OverUntuned | None = None  # the best checkpoint beside it
    outlook: Outlook = field(
        default_factory=Outlook
    )  # what the learning curves say; empty with too few trials
    followed: tuple[FollowedPrompt, ...] = ()  # prompts of a metric of prompts, those not followed first

    @property
    def minimize(self) -> bool:
        return self.spec.direction is Direction.MINIMIZE

    @property
    def attempts(self) -> tuple[AttemptRecord, ...]:
        return tuple(attempt for of_trial in self.attempts_by_trial.values() for attempt in of_trial)

    def attempts_of(self, trial: int) -> tuple[AttemptRecord, ...]:
        return self.attempts_by_trial.get(trial, ())


def report_of(
    study: StudyRecords, *, database: str, answers: Sequence[Answer] = (), now: float
) -> StudyReport:
    """Gather the contents of a study's report; a running study is reported as far as it is."""
    spec, trials = study.spec, study.trials()
    maximize = spec.direction is Direction.MAXIMIZE
    summary = summarise(
        trials,
        lambda trial, evaluation: losses_of(Path(spec.output_dir), trial, evaluation),
        metric=spec.metric,
        maximize=maximize,
    )
    untuned = study.untuned()
    shown = {trial.number: None for trial in (summary.best, summary.default) if trial is not None}
    return StudyReport(
        spec=spec,
        trials=trials,
        attempts_by_trial={
            trial: tuple(attempts)
            for trial, attempts in groupby(study.attempts(), key=lambda attempt: attempt.trial)
        },
        summary=summary,
        importances=importances(spec.space, trials, maximize=maximize),
        outlook=outlook_of(rules_of(spec), trials),
        training=tuple((number, in_one_line(study.progress(number))) for number in shown),
        answers=tuple(answers),
        scores=study.scores(),
        untuned=None if untuned is None else untuned.metric(spec.metric),
        followed=followed_prompts(Path(spec.output_dir), summary.best, metric=spec.metric),
        over_untuned=over_untuned(Path(spec.output_dir), untuned, summary.best, metric=spec.metric),
        database=database,
        written_at=now,
    )


# Measurements


def in_one_line(reports: Sequence[Measurement]) -> tuple[Measurement, ...]:
    """Leave out of the reports of an attempt what a later one that went on from a checkpoint did again."""
    kept: list[Measurement] = []
    for report in reports:
        while kept and kept[-1].attempt < report.attempt and kept[-1].step >= report.step:
            kept.pop()
        kept.append(report)
    return tuple(kept)


def running_s(attempts: Sequence[AttemptRecord]) -> float | None:
    """Return how long trials held a device, over all attempts that have ended, in seconds."""
    ended = [attempt.ended_at - attempt.started_at for attempt in attempts if attempt.ended_at is not None]
    return sum(ended) if ended else None


# Sentences

_STATE_TEXTS = {
    TrialState.COMPLETED: "ran to the end",
    TrialState.STOPPED: "stopped early",
    TrialState.INFEASIBLE: "did not fit in memory",
    TrialState.FAILED: "failed",
    TrialState.RUNNING: "running",
    TrialState.PAUSED: "paused",
    TrialState.WAITING: "waiting",
}


def sentences(report: StudyReport) -> Iterator[str]:
    """Yield the study's results as sentences, most important first."""
    if text := describe_over_untuned(report.over_untuned):
        yield text
    yield describe_gain(report.summary)
    if report.summary.best is not None:
        yield describe_ranking(report.summary.ranking)
    if (final := final_score(report)) is not None:
        yield describe_final(final)
    if text := describe_going_on(report.outlook.going_on):
        yield f"Going on is {text}."
    yield describe_trials(report)
    if text := describe_memory(report):
        yield text
    if report.summary.gain is not None or report.over_untuned is not None:
        yield (
            "The best of many trials was chosen on the very examples that it is measured on, "
            "which flatters it a little; the interval does not cover that."
        )


def describe_trials(report: StudyReport) -> str:
    """Count trials by how they ended; state the devices they ran on and for how long."""
    counts = Counter(trial.state for trial in report.trials)
    num_finished = sum(trial.state.is_finished for trial in report.trials)
    parts = [f"{counts[state]} {text}" for state, text in _STATE_TEXTS.items() if counts[state]]
    held_s = running_s(report.attempts) or 0.0
    devices = sorted({attempt.device_name for attempt in report.attempts})
    where = f", {format_duration(held_s)} of device time on {' and '.join(devices)}" if devices else ""
    return f"{num_finished} of {report.spec.num_trials} trials finished: {', '.join(parts)}{where}."


def describe_memory(report: StudyReport) -> str:
    """Describe how well memory was predicted; empty if nothing was measured."""
    ratios = [
        (peak, trial.plan.estimate)
        for trial in report.trials
        if trial.plan is not None
        and not trial.plan.measures_itself
        and (peak := peak_bytes(report.attempts_of(trial.number), trial))
    ]
    if not ratios:
        return ""
    num_over = sum(peak > estimate.allocated.upper_bytes for peak, estimate in ratios)
    largest, estimate = max(ratios, key=lambda ratio: ratio[0])
    over = "none passed its bound" if not num_over else f"{num_over} of {len(ratios)} passed their bound"
    return (
        f"The largest trial took {gib(largest)}, predicted were {gib(estimate.allocated.median_bytes)} "
        f"and at most {gib(estimate.allocated.upper_bytes)}; {over}."
    )


def final_score(report: StudyReport) -> CheckpointScore | None:
    """Return the best checkpoint's score by the study's metric on the examples held out for the end."""
    best = report.summary.best
    found = [
        score
        for score in report.scores
        if best is not None
        and (score.trial, score.step) == (best.number, best.best_step)
        and (score.examples, score.metric) == ("final", report.spec.metric)
    ]
    return found[-1] if found else None


def describe_final(score: CheckpointScore) -> str:
    """Describe a checkpoint's score on the examples held out for the end."""
    where = "examples" if score.num_examples is None else f"{score.num_examples} examples"
    return f"On {where} not used to choose: {score.metric} {format_metric(score.value)}{_interval(score)}."


def _interval(score: CheckpointScore) -> str:
    if score.low is None or score.high is None:
        return ""
    return f", {format_metric(score.low)} to {format_metric(score.high)} (95 %)"


def score_interval(score: CheckpointScore) -> str:
    """Return the note below a score: its interval, and what it was measured on."""
    return f"{_interval(score)}, not used to choose".removeprefix(", ")


def headline(report: StudyReport) -> tuple[tuple[str, str, str], ...]:
    """Return the figures at the top: label, value, remark."""
    best, default = report.summary.best, report.summary.default
    if best is None:
        return ()
    better = "lower" if report.minimize else "higher"
    figures = [
        (f"Best {report.spec.metric}", format_metric(best.value), f"trial {best.number}, {better} is better")
    ]
    if (over := report.over_untuned) is not None:
        figures.append(("Untuned", format_metric(over.untuned), "the model before tuning"))
        if (difference := over.difference) is not None:
            remark = "nats per token, " if difference.is_loss else f"{over.metric}, "
            remark += "a tie" if difference.is_tie else "95 % interval"
            amount = f"{difference.gain.value:.3g} ± {difference.gain.half:.2g}"
            figures.append(("Over untuned", amount, remark))
    if default is not None and default.number != best.number:
        figures.append(("Default", format_metric(default.value), "the rule-based start"))
        if (gain := report.summary.gain) is not None:
            half = (gain.high - gain.low) / 2
            verdict = "a tie" if gain.is_tie else "95 % interval"
            figures.append(("Gain", f"{gain.nats_per_token:.3g} ± {half:.2g}", f"nats per token, {verdict}"))
    if (final := final_score(report)) is not None:
        figures.append(("On unseen examples", format_metric(final.value), score_interval(final)))
    at = best_measurement(best)
    if at is not None:
        figures.append(("At step", f"{at.step} of {at.num_steps}", f"{at.num_tokens:,} training tokens"))
    return tuple(figures)
