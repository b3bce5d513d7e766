"""Plain lines and JSON lines: the output of `autosft tune` and `autosft train` without a live view.

All outputs, including the live view, receive the same events and the same conclusion.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from autosft.scheduler.events import (
    AdviceGiven,
    NewBest,
    Note,
    StudyEvent,
    StudyOpened,
    TrialEnded,
    TrialForecast,
    TrialMeasured,
    TrialStarted,
    UntunedScored,
    Waiting,
)
from autosft.studies.formatting import format_count, format_duration, format_metric, format_settings
from autosft.studies.wire import to_plain
from autosft.ui.progress import (
    Progress,
    about,
    against_untuned,
    describe_end,
    describe_forecast,
    memory_text,
    time_left_s,
    waiting_text,
)
from autosft.ui.terminal import json_visible

if TYPE_CHECKING:  # both pull in half of the program, and an output has to be there at once
    from autosft.scheduler.finish.conclusion import Conclusion
    from autosft.scheduler.train.training_run import TrainingResult

Clock = Callable[[], float]
Fact = tuple[str, str]  # label and text

#: Facts of a conclusion that are for copying into a shell.
COMMAND_LABELS = ("checkpoint", "model", "try it", "train again", "dashboard", "resume")


class Output(Protocol):
    """Shows a study while it runs."""

    def __call__(self, event: StudyEvent) -> None:
        """Show an event."""
        ...

    def conclude(self, result: object, *, heading: str, facts: Sequence[Fact]) -> None:
        """Show the result: a dataclass for programs, facts for people.  Only `close` may follow."""
        ...

    def close(self) -> None:
        """Restore the terminal; may be called repeatedly."""
        ...

    def abandon(self) -> None:
        """Minimal `close` for use in a signal handler: no locks, no buffers."""
        ...


class JsonLines:
    """One JSON object per line: `event` is the kind, `time` UNIX seconds, the rest the event's fields."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock: Clock = time.time) -> None:
        self._stream = stream
        self._quiet = quiet
        self._clock = clock

    def __call__(self, event: StudyEvent) -> None:
        if not self._quiet:
            self._write(event, to_plain(event))

    def conclude(self, result: object, *, heading: str, facts: Sequence[Fact]) -> None:
        self._write(result, result_as_plain(result))

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def _write(self, value: object, fields: dict[str, Any]) -> None:
        line = {"event": _snake_case(type(value).__name__), "time": round(self._clock(), 3), **fields}
        self._stream.write(json_visible(json.dumps(line, ensure_ascii=False)) + "\n")
        self._stream.flush()


class PlainLines:
    """A line for each event that belongs in a log: no progress bars, no colours."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock: Clock = time.time) -> None:
        self._stream = stream
        self._quiet = quiet
        self._clock = clock
        self._progress = Progress()

    def __call__(self, event: StudyEvent) -> None:
        is_known = isinstance(event, Waiting) and self._progress.waiting  # only the duration has changed
        self._progress.apply(event, now=self._clock())
        if not self._quiet and not is_known:
            for line in lines_for(event, self._progress, now=self._clock()):
                self._write(line)

    def conclude(self, result: object, *, heading: str, facts: Sequence[Fact]) -> None:
        self._write(heading)
        for label, text in facts:
            self._write(f"  {label:<13} {text}")

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def lines_for(event: StudyEvent, progress: Progress, *, now: float) -> list[str]:
    """Return the lines for an event; none for mere progress."""
    match event:
        case StudyOpened():
            return [title(event), *(f"  {line}" for line in event.plan_lines)]
        case TrialStarted(record=record, attempt=attempt, device_names=device_names):
            text = f"trial {record.number} starts on {', '.join(device_names)}: {record.origin}"
            if changed := format_settings(record.parameters, progress.defaults()):
                text += f", {changed}"
            return [text if attempt == 1 else f"{text} (attempt {attempt})"]
        case TrialMeasured(measurement=measurement) if measurement.is_evaluation and progress.opened:
            row = progress.rows.get(measurement.trial)
            plan = row.record.plan if row else None
            metric = progress.opened.metric
            parts = [
                f"trial {measurement.trial} step {measurement.step}/{measurement.num_steps}",
                f"{metric} {format_metric(measurement.metric(metric))}",
                f"loss {format_metric(measurement.loss)}" if measurement.loss is not None else "",
                f"{format_count(measurement.tokens_per_s)} tokens/s" if measurement.tokens_per_s else "",
                f"memory {memory_text(row.peak_bytes, plan.booked_bytes if plan else None)}"
                if row and row.peak_bytes
                else "",
            ]
            return [", ".join(part for part in parts if part)]
        case TrialForecast(trial=trial) if progress.opened:
            return [f"trial {trial} {describe_forecast(event, progress.opened.metric)}"]
        case TrialEnded(record=record):
            metric = progress.opened.metric if progress.opened else "value"
            text = f"trial {record.number} {describe_end(progress.rows[record.number], metric)}"
            counts = f"{progress.num_finished} of {progress.num_trials} finished"
            left = (
                about(time_left_s(progress, now=now)) if progress.num_finished < progress.num_trials else ""
            )
            message = [f"  {record.message}"] if record.message else []
            return [f"{text}; {counts}{', ' + left if left else ''}", *message]
        case UntunedScored(metric=metric, value=value):
            return [f"untuned model: {metric} {format_metric(value)}"]
        case NewBest(trial=trial, value=value, step=step):
            words = f"best so far: trial {trial}, {format_metric(value)} at step {step}"
            against = against_untuned(event)
            return [f"{words}, {against}" if against else words]
        case Waiting(message=message):
            return [waiting_text(message)]
        case AdviceGiven(trial=trial, message=message):
            return [f"advice, trial {trial}: {message}"]
        case Note(message=message):
            return [message]
    return []


def title(opened: StudyOpened) -> str:
    """Return the first line of a study."""
    better = "lower" if opened.minimize else "higher"
    earlier = f", {opened.num_finished} of them finished earlier" if opened.num_finished else ""
    trials = "1 trial" if opened.num_trials == 1 else f"{opened.num_trials} trials"
    return f"study {opened.study}: {trials}{earlier}, by {opened.metric} ({better} is better)"


def conclusion_facts(conclusion: Conclusion) -> list[Fact]:
    """Return the result of a study, most important facts first, commands last."""
    trials = f"{conclusion.num_finished} of {conclusion.num_trials} trials finished"
    if conclusion.num_cut:
        trials += f", {conclusion.num_cut} of them cut short by the time budget,"
    trials += f" in {format_duration(conclusion.duration_s)}"
    if conclusion.best_trial is None:
        facts = [("best", f"none yet: no finished trial has been evaluated; {trials}")]
    else:
        at_step = f" at step {conclusion.best_step}" if conclusion.best_step is not None else ""
        facts = [
            (
                "best",
                f"trial {conclusion.best_trial}, {conclusion.metric} {format_metric(conclusion.best_value)}"
                f"{at_step}; {trials}",
            ),
            ("settings", format_settings(conclusion.best_parameters, {})),
            ("over untuned", describe_gain_over_untuned(conclusion)),
            ("gain", conclusion.gain),
            ("chosen", conclusion.choice),
            ("going on", conclusion.going_on),
        ]
    facts += [
        ("answers", conclusion.answers or ""),
        *(("note", note) for note in conclusion.notes),
        ("idle", describe_idle_time(conclusion)),
        ("checkpoint", str(conclusion.best_checkpoint or "")),
        ("train again", f"autosft train {shell_word(conclusion.best_yaml)}" if conclusion.best_yaml else ""),
        ("dashboard", conclusion.dashboard_command),
        ("resume", conclusion.resume_command),
    ]
    return [(label, text) for label, text in facts if text]


def describe_gain_over_untuned(conclusion: Conclusion) -> str:
    """Say whether tuning has beaten the model that it started from; empty where that was not scored."""
    from autosft.studies.results.over_untuned import describe_over_untuned

    return describe_over_untuned(conclusion.over_untuned)


def describe_idle_time(conclusion: Conclusion) -> str:
    """Describe how long devices were idle between trials, and what sharing them cost."""
    if conclusion.median_gap_s is None:
        return ""
    times = "once" if conclusion.num_gaps == 1 else f"{conclusion.num_gaps} times"
    text = (
        f"{conclusion.median_gap_s:.2f} s from a trial's end to the next one's first step on its device "
        f"(median; {times}, {format_duration(conclusion.idle_s)} in all)"
    )
    if conclusion.sharing_overhead is None:
        return text
    return f"{text}; sharing a GPU cost {conclusion.sharing_overhead - 1:.0%} (measured)"


def training_facts(result: TrainingResult) -> list[Fact]:
    """Return the result of a single run, next to what its study measured."""
    metric = f"{result.metric} {format_metric(result.value)}" if result.value is not None else "not evaluated"
    expected = f"; the study measured {format_metric(result.expected_value)}" if result.expected_value else ""
    state = "to the end" if result.is_complete else "stopped; run the same command to resume"
    best = ""
    if result.best_value is not None:  # not the last checkpoint
        best = f"{result.metric} {format_metric(result.best_value)} at step {result.best_step}"
        best += f": {result.best_checkpoint}" if result.best_checkpoint else ""
    facts = [
        ("result", f"{metric}{expected}"),
        ("trained", f"{state}, {format_duration(result.duration_s)}"),
        ("checkpoint", str(result.checkpoint or "")),
        ("best", best),
        ("model", str(result.model or "")),
        ("try it", f"autosft chat {shell_word(result.model)} --compare base" if result.model else ""),
    ]
    return [(label, text) for label, text in facts if text]


def result_as_plain(result: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON, paths as text."""
    values = {name: getattr(result, name) for name in result.__dataclass_fields__}
    return {
        name: str(value) if isinstance(value, Path) else to_plain(value) for name, value in values.items()
    }


def shell_word(value: object) -> str:
    """Quote a word for this system's shell."""
    if sys.platform == "win32":
        import subprocess

        return subprocess.list2cmdline([str(value)])
    import shlex

    return shlex.quote(str(value))


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
