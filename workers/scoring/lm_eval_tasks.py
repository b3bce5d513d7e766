"""Score a saved model on tasks of lm-eval."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autosft.profiles.errors import MissingExtraError, UserError
from autosft.studies.intervals import mean_from_error
from autosft.studies.metrics import METRICS
from autosft.workers.scoring.saved_models import LoadedModel, Score, scored


def task_scores(
    loaded: LoadedModel, task: str, *, limit: int | None, batch_size: int, task_folder: Path | None
) -> list[Score]:
    """Run a task of lm-eval.  Raises UserError if it is unknown, MissingExtraError without lm-eval."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError(what=f"--metric {task}", extra="eval") from error
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    if task not in manager.all_tasks:
        raise UserError(
            f"--metric {task}: lm-eval has no such task.",
            remedy=f"Known: {', '.join(METRICS)}, a task of lm-eval (lm-eval ls tasks), or "
            "python:module.function.",
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about models that are already loaded
    with quiet_unless_terminal():
        network = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model=network,
            tasks=[task],
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    assert found is not None  # None only on ranks other than the first
    return [score for name, results in found["results"].items() for score in _of_task(name, results, found)]


@contextlib.contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """Keep progress bars, and the output of git, which lm-eval runs, out of pipes and logs."""
    if sys.stderr.isatty():
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nothing, contextlib.redirect_stderr(nothing):
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _of_task(name: str, results: dict[str, Any], found: Any) -> list[Score]:
    """Return the scores in a task's results, such as "acc,none" and its "acc_stderr,none"."""
    num = found.get("n-samples", {}).get(name, {}).get("effective")
    scores = []
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if not isinstance(value, int | float) or not filtered or metric.endswith("_stderr"):
            continue
        error = results.get(f"{metric}_stderr,{filtered}")
        known_error = float(error) if isinstance(error, int | float) else math.inf
        label = f"{name} {metric}" + ("" if filtered == "none" else f" ({filtered})")
        scores.append(scored(label, mean_from_error(float(value), known_error, num)))
    return scores
