"""Prompts that a study's models answered, and which of their instructions were followed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.ifeval_prompts import read_prompts
from autosft.profiles.errors import UserError
from autosft.studies.files.checkpoints import (
    UNTUNED_EVALUATION,
    prompt_scores_path,
    trial_dir,
    untuned_dir,
)
from autosft.studies.metrics import Evidence, find_metric
from autosft.studies.results.summary import best_measurement
from autosft.studies.trial import TrialRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedPrompt:
    """A prompt, its instructions, and which of them the best checkpoint followed strictly.

    `before` says the same of the untuned model, empty where that is not known; `answer` is the best
    checkpoint's, empty in files of old versions.
    """

    prompt: str
    instructions: tuple[str, ...]
    followed: tuple[bool, ...]
    before: tuple[bool, ...] = ()
    answer: str = ""

    @property
    def failed(self) -> tuple[str, ...]:
        """The instructions that were not followed."""
        pairs = zip(self.instructions, self.followed, strict=True)
        return tuple(name for name, is_followed in pairs if not is_followed)

    @property
    def change(self) -> str:
        """Whether tuning changed the outcome of the whole prompt: "gained", "lost" or ""."""
        if not self.before or all(self.before) == all(self.followed):
            return ""
        return "gained" if all(self.followed) else "lost"


def followed_prompts(study_dir: Path, best: TrialRecord | None, *, metric: str) -> tuple[FollowedPrompt, ...]:
    """Return the prompts that the best checkpoint was scored on, those not followed first.

    Empty for metrics of tokens, and where the files are not on this machine.  A score that was cut short
    covers the first prompts only.
    """
    at = None if best is None else best_measurement(best)
    if find_metric(metric).evidence is not Evidence.PROMPTS or best is None or at is None:
        return ()
    scored = None
    if at.evaluation is not None:
        scored = _read(prompt_scores_path(trial_dir(study_dir, best.number), at.evaluation))
    try:
        prompts = read_prompts(str(study_dir / f"{metric}.jsonl"))
    except UserError:
        return ()
    if scored is None:
        return ()
    before = _read(prompt_scores_path(untuned_dir(study_dir), UNTUNED_EVALUATION)) or {"strict": ()}
    answers = scored.get("answers") or [""] * len(scored["strict"])
    rows = [
        FollowedPrompt(
            prompt=prompt.prompt,
            instructions=prompt.instructions,
            followed=tuple(flags),
            before=tuple(before["strict"][number]) if number < len(before["strict"]) else (),
            answer=answers[number],
        )
        for number, (prompt, flags) in enumerate(zip(prompts, scored["strict"], strict=False))
        if len(flags) == len(prompt.instructions)
    ]
    return tuple(sorted(rows, key=lambda row: all(row.followed)))


def _read(path: Path) -> dict[str, Any] | None:
    """Return a saved score; None if it is missing or broken."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return plain if isinstance(plain["strict"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
