"""`autosft evaluate`: scores models side by side, with intervals and paired differences."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autosft.commands.evaluate_checks import Asked, Ready, check_all, date_for
from autosft.commands.evaluate_rows import Row, as_plain, line_of, rows_of, show
from autosft.commands.evaluate_scores import ScoredModel, Scorer
from autosft.commands.options import (
    AsJson,
    Command,
    Quiet,
    Storage,
    TemplateDate,
    application,
    teach,
    write_json,
)
from autosft.commands.remote import run as on_server
from autosft.commands.remote import with_server

if TYPE_CHECKING:
    from autosft.profiles.dataset.ifeval_prompts import Prompt

app = application()


@app.command(
    "evaluate",
    cls=Command,
    help=teach(
        "Score models side by side: 95 % intervals, and paired differences to the first.",
        "autosft evaluate ./llama my-study --metric eval_loss",
        "autosft evaluate ./llama my-model best.yaml --metric eval_loss --data mine.json",
        "autosft evaluate out/trials/0001/checkpoints/* --metric ifeval --race",
        "autosft evaluate my-model --metric hellaswag --metric python:mine.score",
    ),
    epilog="A metric is one of autosft tune's, a task of lm-eval, or python:module.function of (model, "
    "tokenizer).  Without --data, models are scored on the examples that a study held out for the final "
    "score: their own, or that of another argument.  All are checked before one is scored; what is done is "
    "shown and kept, and the same command again scores the rest.",
)
@with_server(on_server("evaluate"))
def evaluate(
    given_models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Studies, checkpoints, adapters, model folders, best.yaml files, hub ids.",
            show_default=False,
        ),
    ],
    *,
    metric: Annotated[list[str], typer.Option(metavar="NAME", help="Metric; may be repeated.")],
    data: Annotated[str | None, typer.Option(metavar="PATH_OR_HUB_ID", help="For the eval_ metrics.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Truncate longer examples to N tokens.")
    ] = None,
    ifeval_data: Annotated[
        str, typer.Option(metavar="PATH_OR_HUB_ID", help="IFEval prompts: JSON file or hub id.")
    ] = "google/IFEval",
    ifeval_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Maximum length of an IFEval answer, in tokens.")
    ] = 1280,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Use only N prompts or examples of a task."),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Batch size of lm-eval tasks.")] = 4,
    template_date: TemplateDate = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder with more lm-eval tasks.")
    ] = None,
    race: Annotated[
        bool,
        typer.Option("--race", help="ifeval: give up early on clearly worse checkpoints."),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Score again what an earlier run of this command has scored.")
    ] = False,
    storage: Storage = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score models side by side: 95 % intervals, and paired differences to the first."""
    from autosft.commands.databases import known_studies
    from autosft.scheduler.finish.given_models import resolve_model
    from autosft.studies.metrics import current_name

    with known_studies(storage) as studies:
        models = [resolve_model(given, studies) for given in given_models]
        asked = Asked(
            metrics=tuple(dict.fromkeys(current_name(name) for name in metric)),
            data=data,
            seq_len=seq_len,
            ifeval_data=ifeval_data,
            ifeval_new_tokens=ifeval_new_tokens,
            limit=limit,
            batch_size=batch_size,
            task_folder=task_folder,
            template_date=date_for([model.source for model in models], template_date),
            race=race,
            trust_remote_code=trust_remote_code,
            again=again,
        )
        prompts, notes = prompts_of(asked)
        ready = check_all(models, asked)
        for note in () if quiet or as_json else notes:
            typer.echo(note, err=True)
        rows = score_all(ready, asked, prompts, is_quiet=quiet or as_json)
    if as_json:
        write_json([as_plain(row) for row in rows])
        return
    show(rows)
    kept = sorted({study.spec.name for row in rows if (study := row.model.ready.model.study) is not None})
    if kept and not quiet:
        typer.echo(f"Stored with {', '.join(kept)}.")


def score_all(
    ready: Sequence[Ready], asked: Asked, prompts: Sequence[Prompt], *, is_quiet: bool
) -> list[Row]:
    """Score models one after another; what is done is shown and kept at once."""
    from autosft.workers.scoring.precision import common_dtype

    scorer = Scorer(asked=asked, prompts=tuple(prompts), is_quiet=is_quiet)
    dtype = common_dtype([each.folder for each in ready])
    rows: list[Row] = []
    first: ScoredModel | None = None
    for number, each in enumerate(ready, start=1):
        if not is_quiet:
            typer.echo(f"scoring {each.name} ({number} of {len(ready)})", err=True)
        found = scorer.score(each, dtype=dtype)
        first = first or found
        keep_with_study(found, asked)
        new = rows_of(found, first)
        rows += new
        for row in () if is_quiet or len(ready) == 1 else new:
            typer.echo(line_of(row), err=True)
    return rows


def prompts_of(asked: Asked) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """Read IFEval's prompts if they are needed, and name those that cannot be scored."""
    from autosft.studies.metrics import Evidence, known_metric

    if not any(m is not None and m.evidence is Evidence.PROMPTS for m in map(known_metric, asked.metrics)):
        return (), ()
    from autosft.profiles.dataset.ifeval_prompts import has_punkt, read_prompts, scorable, shuffled

    prompts, notes = scorable(read_prompts(asked.ifeval_data), has_punkt=has_punkt())
    return shuffled(prompts, seed=0)[: asked.limit], notes


def keep_with_study(found: ScoredModel, asked: Asked) -> None:
    """Store a model's scores in the study that it belongs to, if there is one."""
    from autosft.studies.values import CheckpointScore

    study, record = found.ready.model.study, found.ready.model.record
    if study is None or record is None:
        return
    study.add_scores(
        CheckpointScore(
            trial=record.trial,
            step=record.step,
            examples=examples_of(score.metric, asked)[:200],
            metric=score.metric[:200],
            value=score.value,
            low=score.low,
            high=score.high,
            num_examples=score.num_examples,
            recorded_at=time.time(),
        )
        for score in found.scores
    )


def examples_of(metric: str, asked: Asked) -> str:
    """Name the examples that a score was computed on."""
    from autosft.studies.metrics import IFEVAL, METRICS, Evidence

    if metric in METRICS and METRICS[metric].evidence is Evidence.TOKENS:
        return asked.data or "final"
    if metric.startswith(IFEVAL):  # or measured beside it
        return asked.ifeval_data
    return metric
