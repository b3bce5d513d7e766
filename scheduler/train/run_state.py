"""The folder of `autosft train`: which run it holds, and what a later attempt resumes from."""

from __future__ import annotations

import json
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.scheduler.events import Note, Observer
from autosft.studies.export import ExportedConfig
from autosft.studies.files.checkpoints import MANIFEST, checkpoint_dir, step_of, verify
from autosft.studies.metrics import METRICS, Metric
from autosft.studies.trial import Measurement
from autosft.studies.wire import from_plain, to_plain

#: The evaluations of all attempts, one per line.
EVALUATIONS = "evaluations.jsonl"
#: Which run a folder holds; its presence makes a folder one of `autosft train`.
RUN_NOTE = "run.json"


def refuse_another_run(folder: Path, config: ExportedConfig) -> None:
    """Record in the folder which run it holds.  Raises UserError if it holds another run."""
    note = folder / RUN_NOTE
    ours = {
        "model": config.model.fingerprint,
        "data": config.data.fingerprint,
        "settings": to_plain(config.settings),
    }
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != ours:
        raise UserError(
            f"{folder} holds another run, which this one would resume.",
            remedy="Give a new folder with --output, or delete that one.",
        )
    note.write_text(json.dumps(ours, indent=2), encoding="utf-8")


def last_checkpoint(folder: Path, observe: Observer) -> Path | None:
    """Return the last complete checkpoint of earlier attempts; report damaged ones, which are skipped."""
    for candidate in sorted(checkpoint_dir(folder, 0).parent.glob("step-*"), reverse=True):
        try:
            verify(candidate)
        except UserError as error:
            observe(Note(message=f"Not used: {error.message}"))
            continue
        return candidate
    return None


def keep_evaluation(folder: Path, evaluation: Measurement) -> None:
    """Record an evaluation, for a later attempt that resumes from its checkpoint."""
    with (folder / EVALUATIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(to_plain(evaluation)) + "\n")


def kept_evaluations(folder: Path, *, up_to: int) -> list[Measurement]:
    """Return earlier attempts' evaluations up to a step, the last one of each step, by step."""
    path, found = folder / EVALUATIONS, {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            evaluation = from_plain(Measurement, json.loads(line))
        except ValueError:  # the last line, if the process was killed while writing
            continue
        found[evaluation.step] = evaluation
    return [found[step] for step in sorted(found) if step <= up_to]


def best_kept_checkpoint(folder: Path, metric: Metric = METRICS["eval_loss"]) -> Path | None:
    """Return the checkpoint of a run with the best value of a metric, else the last; None without any.

    Where an older run was chosen by another metric, nothing here says by which.
    """
    sign = 1.0 if metric.minimize else -1.0
    here = {
        step_of(path): path
        for path in sorted(checkpoint_dir(folder, 0).parent.glob("step-*"))
        if (path / MANIFEST).is_file()
    }
    evaluations = kept_evaluations(folder, up_to=max(here, default=0))
    scored = [
        (sign * value, -evaluation.step)
        for evaluation in evaluations
        if evaluation.step in here and (value := evaluation.metric(metric.name)) is not None
    ]
    if scored:
        return here[-min(scored)[1]]
    return here[max(here)] if here else None
