"""What a study came to: the best trial, its gain, what to do next.  Values and words, no I/O but reading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
    best_checkpoint: Path | None  # a model folder for AutoModelForCausalLM.from_pretrained
    best_parameters: tuple[tuple[str, float | int | str], ...]
    best_yaml: Path | None  # for `autosft train`
    gain: str  # in words, against the default configuration, with its uncertainty; a tie is called a tie
    answers: str | None  # demo: share of held-out instructions answered right, untuned and best
    storage_url: str
    dashboard_command: str
    resume_command: str
    duration_s: float
    notes: tuple[str, ...] = ()
