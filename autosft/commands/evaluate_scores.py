"""Scores the models of `autosft evaluate`, one at a time; what is finished is kept, and found again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from autosft.commands.evaluate_checks import Asked, Ready
from autosft.profiles.progress_bar import progress_bar
from autosft.ui.terminal import status_line

if TYPE_CHECKING:
    from autosft.profiles.dataset.ifeval_prompts import Prompt
    from autosft.studies.results.losses import ExampleLosses
    from autosft.workers.scoring.saved_models import LoadedModel, Score

#: Part of the name of what is kept; changes where scores would come out otherwise.
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredModel:
    """What a model scored, and by example what pairs it with others."""

    ready: Ready
    scores: tuple[Score, ...]
    losses: ExampleLosses | None = None  # where a metric is of tokens
    passes: tuple[bool, ...] | None = None  # which IFEval prompts it followed; None where it was given up
    is_from_before: bool = False  # scored by an earlier run of the command


@dataclass(slots=True, kw_only=True)
class Scorer:
    """Scores models, one after another.  Holds IFEval's prompts and the best model on them so far."""

    asked: Asked
    prompts: tuple[Prompt, ...]
    is_quiet: bool
    best: tuple[bool, ...] | None = field(default=None)

    def score(self, ready: Ready, *, dtype: str) -> ScoredModel:
        """Return a model's scores by every metric, those of an earlier run where nothing has changed."""
        key = key_of(ready, self.asked, dtype)
        kept = None if key is None or self.asked.again else read_kept(key, ready)
        if kept is None:
            kept = self._score(ready, dtype)
            if key is not None:
                keep(key, kept)
        passes = kept.passes
        if passes is not None and (self.best is None or sum(passes) > sum(self.best)):
            self.best = passes
        return kept

    def _score(self, ready: Ready, dtype: str) -> ScoredModel:
        from functools import partial

        from autosft.profiles.dataset.tokenizer import say_nothing
        from autosft.workers.scoring.saved_models import load

        with status_line(f"Loading {ready.folder} …", is_quiet=self.is_quiet):
            loaded = load(
                ready.folder,
                trust_remote_code=ready.trust_remote_code,
                template_date=self.asked.template_date,
                dtype=dtype,
                say=say_nothing if self.is_quiet else partial(typer.echo, err=True),
            )
        found = ScoredModel(ready=ready, scores=())
        for name in self.asked.metrics:
            found = self._by_metric(name, loaded, found)
        return found

    def _by_metric(self, name: str, loaded: LoadedModel, found: ScoredModel) -> ScoredModel:
        """Return what is found with the scores of another metric."""
        from autosft.studies.metrics import Evidence, known_metric
        from autosft.workers.scoring.lm_eval_tasks import task_scores
        from autosft.workers.scoring.saved_models import function_scores, token_scores

        metric, asked = known_metric(name), self.asked
        losses, passes = found.losses, found.passes
        if metric is not None and metric.evidence is Evidence.TOKENS:
            losses = losses or self._losses(loaded, found.ready)
            scores = [score for score in token_scores(losses) if score.metric == metric.name]
        elif metric is not None:
            scores, passes = self._answers(loaded)
        elif name.startswith("python:"):
            scores = function_scores(loaded, name.removeprefix("python:"))
        else:
            scores = task_scores(
                loaded, name, limit=asked.limit, batch_size=asked.batch_size, task_folder=asked.task_folder
            )
        return ScoredModel(ready=found.ready, scores=(*found.scores, *scores), losses=losses, passes=passes)

    def _losses(self, loaded: LoadedModel, ready: Ready) -> ExampleLosses:
        from autosft.profiles.dataset.prepared import Split
        from autosft.studies.results.losses import ExampleLosses
        from autosft.workers.scoring.saved_models import SPLIT_BATCH, evaluate_splits, evaluate_text

        if self.asked.text is not None:
            found = evaluate_text(loaded, self.asked.text)
        else:
            assert ready.data is not None
            splits = (Split.FINAL,) if ready.is_held_out else tuple(Split)
            num = sum(ready.data.counts(split).num_examples for split in splits)
            with self._progress(-(-num // SPLIT_BATCH), "batches") as step:
                found = evaluate_splits(loaded, ready.data, splits, seq_len=ready.seq_len, on_batch=step)
        return ExampleLosses(
            step=0, loss_sums=found.loss_sums, num_tokens=found.num_tokens, num_correct=found.num_correct
        )

    def _answers(self, loaded: LoadedModel) -> tuple[list[Score], tuple[bool, ...] | None]:
        from autosft.workers.scoring.saved_models import ask_prompts, prompt_scores

        with self._progress(len(self.prompts), "prompts") as step:
            found = ask_prompts(
                loaded,
                self.prompts,
                max_new_tokens=self.asked.ifeval_new_tokens,
                incumbent=self.best if self.asked.race else None,
                on_answer=step,
            )
        return prompt_scores(found, len(self.prompts)), None if found.is_raced else found.passes

    @contextlib.contextmanager
    def _progress(self, num: int, unit: str) -> Iterator[Callable[[], object]]:
        """Show a bar with the time left where a person looks on."""
        with progress_bar(is_quiet=self.is_quiet, total=num, unit=f" {unit}") as bar:
            yield bar.update


# What is kept


def key_of(ready: Ready, asked: Asked, dtype: str) -> str | None:
    """Return a name for what a model scores; None where that may change unseen: functions and tasks."""
    from autosft.studies.metrics import METRICS

    if not set(asked.metrics) <= set(METRICS) or asked.race:
        return None
    prompts = Path(asked.ifeval_data).expanduser()
    parts = [
        str(VERSION),
        *asked.metrics,
        *files_of(ready.folder),
        dtype,
        ready.data.fingerprint if ready.data is not None else "",
        *(files_of(str(asked.text)) if asked.text is not None else ()),
        str((ready.is_held_out, ready.seq_len, asked.limit, asked.ifeval_new_tokens, asked.template_date)),
        *(files_of(str(prompts)) if "ifeval" in asked.metrics else ()),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def files_of(source: str) -> Sequence[str]:
    """Return what tells a folder or file from what it was before; of a hub id the id."""
    path = Path(source).expanduser()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [
        source,
        *(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()),
    ]


def kept_path(key: str) -> Path:
    from autosft.profiles.own_folders import cache_folder

    return cache_folder() / "evaluations" / f"{key}.json"


def keep(key: str, found: ScoredModel) -> None:
    """Keep a model's scores for the next run of the command; atomically."""
    from autosft.studies.wire import to_plain

    path = kept_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"scores": to_plain(found.scores), "losses": to_plain(found.losses), "passes": found.passes}
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(whole))
    partial.replace(path)


def read_kept(key: str, ready: Ready) -> ScoredModel | None:
    """Return what an earlier run has kept; None where there is nothing whole."""
    from autosft.studies.results.losses import ExampleLosses
    from autosft.studies.wire import from_plain
    from autosft.workers.scoring.saved_models import Score

    try:
        plain: dict[str, Any] = json.loads(kept_path(key).read_text())
        losses, passes = plain["losses"], plain["passes"]
        return ScoredModel(
            ready=ready,
            scores=from_plain(tuple[Score, ...], plain["scores"]),
            losses=None if losses is None else from_plain(ExampleLosses, losses),
            passes=None if passes is None else tuple(passes),
            is_from_before=True,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
