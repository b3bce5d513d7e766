"""`autosft evaluate`: scores checkpoints side by side, with intervals, and stores the scores."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from autosft.profiles.own_folders import cache_folder

if TYPE_CHECKING:
    from autosft.profiles.dataset.ifeval_prompts import Prompt
    from autosft.profiles.dataset.prepared import PreparedData
    from autosft.studies.store.study_records import StudyRecords
    from autosft.studies.values import CheckpointRecord
    from autosft.workers.scoring.saved_models import LoadedModel, Score

app = application()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The flags of the command."""

    metrics: tuple[str, ...]
    data: str | None
    seq_len: int | None
    ifeval_data: str
    ifeval_new_tokens: int
    limit: int | None
    batch_size: int
    task_folder: Path | None
    template_date: str | None  # what all of them are asked with, where a template writes today's
    race: bool
    trust_remote_code: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A score of a checkpoint."""

    checkpoint: str
    study: str | None  # that it belongs to, where it is in the database
    trial: int | None
    step: int | None
    score: Score


@app.command(
    "evaluate",
    cls=Command,
    help=teach(
        "Score checkpoints side by side, with 95 % intervals; a study's scores are stored with it.",
        "autosft evaluate out/trials/0001/checkpoints/* --metric ifeval --race",
        "autosft evaluate ./llama best/checkpoints/step-000120 --metric eval_perplexity --data held_out.txt",
        "autosft evaluate best/checkpoints/step-000120 --metric hellaswag --metric python:mine.score",
    ),
    epilog="A metric is one of autosft tune's, a task of lm-eval, or python:module.function of (model, "
    "tokenizer).  Without --data, a study's checkpoint is scored on the examples that its study held out "
    "for the final score.",
)
def evaluate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(metavar="CHECKPOINT...", help="Model folders or hub ids.", show_default=False),
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
    storage: Storage = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score checkpoints side by side, with 95 % intervals; a study's scores are stored with it."""
    from autosft.studies.metrics import current_name

    asked = Asked(
        metrics=tuple(dict.fromkeys(current_name(name) for name in metric)),
        data=data,
        seq_len=seq_len,
        ifeval_data=ifeval_data,
        ifeval_new_tokens=ifeval_new_tokens,
        limit=limit,
        batch_size=batch_size,
        task_folder=task_folder,
        template_date=date_for([checked(checkpoint) for checkpoint in checkpoints], template_date),
        race=race,
        trust_remote_code=trust_remote_code,
    )
    folders = [checked(checkpoint) for checkpoint in checkpoints]
    with known_studies(storage) as studies:
        rows = scored(folders, asked, studies, is_quiet=quiet or as_json)
    if as_json:
        write_json([as_plain(row) for row in rows])
        return
    show(rows)
    kept = sorted({row.study for row in rows if row.study is not None})
    if kept and not quiet:
        typer.echo(f"Stored with {', '.join(kept)}.")


def checked(checkpoint: str) -> str:
    """Return a folder's absolute path, or a URL or hub id unchanged.  Raises UserError for other paths."""
    from autosft.profiles.dataset.hub import looks_like_path
    from autosft.profiles.errors import UserError
    from autosft.profiles.model.gguf import is_gguf
    from autosft.studies.files.remote import is_url

    if is_url(checkpoint):
        return checkpoint.rstrip("/")
    folder = Path(checkpoint).expanduser()
    if folder.is_dir() or is_gguf(checkpoint):
        return str(folder.resolve())
    if folder.exists() or looks_like_path(checkpoint):
        raise UserError(f"{checkpoint} is not a model folder.", remedy="Give the folder of a checkpoint.")
    return checkpoint


def date_for(folders: Sequence[str], given: str | None) -> str | None:
    """Return the date that all models are asked with: as given, or the first one trained with one's.

    Only chat templates that write today's date take it; None is today.
    """
    from autosft.profiles.dataset.template_date import date_in_files, parse_date

    if given is not None:
        return parse_date(given)
    dates = (date_in_files([Path(folder) / "tokenizer_config.json"]) for folder in folders)
    return next(filter(None, dates), None)


@contextmanager
def known_studies(storage: str | None) -> Iterator[list[StudyRecords]]:
    """Open every study of the database, none where there is no database."""
    from autosft.commands.databases import existing_database, reading
    from autosft.profiles.errors import UserError

    try:
        existing_database(storage)
    except UserError:
        if storage is not None:
            raise
        yield []
        return
    with reading(storage) as records:
        yield [records.read_study(overview.spec.name) for overview in records.studies()]


def scored(
    folders: Sequence[str], asked: Asked, studies: Sequence[StudyRecords], *, is_quiet: bool
) -> list[Row]:
    """Score every checkpoint by every metric, a model at a time, and keep what belongs to a study."""
    from autosft.profiles.dataset.tokenizer import say_nothing
    from autosft.studies.files.study_folder import fetched_with_progress
    from autosft.workers.scoring.saved_models import load

    prompts, notes = prompts_of(asked)
    for note in () if is_quiet else notes:
        typer.echo(note, err=True)
    rows: list[Row] = []
    best: tuple[bool, ...] | None = None
    for folder in folders:
        if not is_quiet:
            typer.echo(f"scoring {folder}", err=True)
        home = home_of(folder, studies)
        loaded = load(
            str(fetched_with_progress(folder)),
            trust_remote_code=asked.trust_remote_code
            or (home is not None and home[0].spec.trust_remote_code),
            template_date=asked.template_date,
            say=say_nothing if is_quiet else partial(typer.echo, err=True),
        )
        scores: list[Score] = []
        for name in asked.metrics:
            found, best = by_metric(name, folder, loaded, asked, prompts=prompts, best=best, home=home)
            scores += found
        if home is not None:
            keep(scores, home, asked)
        study, record = home or (None, None)
        rows += [
            Row(
                checkpoint=folder,
                study=None if study is None else study.spec.name,
                trial=None if record is None else record.trial,
                step=None if record is None else record.step,
                score=score,
            )
            for score in scores
        ]
    return rows


Home = tuple["StudyRecords", "CheckpointRecord"]


def home_of(folder: str, studies: Sequence[StudyRecords]) -> Home | None:
    """Return the study that a checkpoint belongs to and its record, if it is known."""
    for study in studies:
        for record in study.checkpoints():
            if folder in (record.path, str(Path(record.path).resolve())):
                return study, record
    return None


def prompts_of(asked: Asked) -> tuple[tuple[Prompt, ...], tuple[str, ...]]:
    """Read IFEval's prompts if they are needed, and name those that cannot be scored."""
    from autosft.studies.metrics import Evidence, known_metric

    if not any(m is not None and m.evidence is Evidence.PROMPTS for m in map(known_metric, asked.metrics)):
        return (), ()
    from autosft.profiles.dataset.ifeval_prompts import has_punkt, read_prompts, scorable, shuffled

    prompts, notes = scorable(read_prompts(asked.ifeval_data), has_punkt=has_punkt())
    return shuffled(prompts, seed=0)[: asked.limit], notes


def by_metric(
    name: str,
    folder: str,
    loaded: LoadedModel,
    asked: Asked,
    *,
    prompts: Sequence[Prompt],
    best: tuple[bool, ...] | None,
    home: Home | None,
) -> tuple[list[Score], tuple[bool, ...] | None]:
    """Score a model by a metric; also return which IFEval prompts the best model so far follows."""
    from autosft.studies.metrics import Evidence, known_metric
    from autosft.workers.scoring.lm_eval_tasks import task_scores
    from autosft.workers.scoring.saved_models import ask_prompts, function_scores, prompt_scores

    metric = known_metric(name)
    if metric is not None and metric.evidence is Evidence.TOKENS:
        return [score for score in losses(folder, loaded, asked, home) if score.metric == metric.name], best
    if metric is not None:
        found = ask_prompts(
            loaded,
            prompts,
            max_new_tokens=asked.ifeval_new_tokens,
            incumbent=best if asked.race else None,
        )
        if not found.is_raced and (best is None or sum(found.passes) > sum(best)):
            best = found.passes
        return prompt_scores(found, len(prompts)), best
    if name.startswith("python:"):
        return function_scores(loaded, name.removeprefix("python:")), best
    scores = task_scores(
        loaded, name, limit=asked.limit, batch_size=asked.batch_size, task_folder=asked.task_folder
    )
    return scores, best


def losses(folder: str, loaded: LoadedModel, asked: Asked, home: Home | None) -> list[Score]:
    """Score a model on --data (plain text by a sliding window) or on its study's final split."""
    from autosft.profiles.dataset.prepared import Split
    from autosft.profiles.errors import UserError
    from autosft.workers.scoring.saved_models import loss_scores, text_scores

    if asked.data is not None and Path(asked.data).suffix == ".txt" and Path(asked.data).is_file():
        return text_scores(loaded, Path(asked.data))
    if asked.data is None and home is None:
        raise UserError(
            f"{folder} belongs to no study in the database, so there is no data to score it on.",
            remedy="Give --data, or --storage with the study's database.",
        )
    prepared = data_for(folder, asked, home)
    if asked.data is not None:
        return loss_scores(loaded, prepared, tuple(Split), seq_len=asked.seq_len)
    assert home is not None
    return loss_scores(
        loaded, prepared, (Split.FINAL,), seq_len=asked.seq_len or home[0].spec.pinned.eval_seq_len
    )


def data_for(folder: str, asked: Asked, home: Home | None) -> PreparedData:
    """Prepare --data, or the data of the checkpoint's study."""
    from autosft.profiles.dataset import prepare
    from autosft.profiles.model.profile import load_model_profile

    options: dict[str, Any] = {"trust_remote_code": asked.trust_remote_code}
    if asked.data is not None:
        source, model = asked.data, base_of(folder)
        options["template_date"] = asked.template_date
    else:
        assert home is not None
        spec = home[0].spec
        source, model = spec.data, spec.model
        options |= spec.data_options or {}
        options["trust_remote_code"] |= spec.trust_remote_code
    profile = load_model_profile(model, trust_remote_code=options["trust_remote_code"])
    return prepare(
        source,
        model=model,
        cache_dir=cache_folder() / "data",
        max_positions=profile.max_positions or None,
        num_embeddings=profile.vocab_size,
        **options,
    )


def base_of(folder: str) -> str:
    """Return the model that reads data for `folder`: the base of an adapter, else the folder itself."""
    file = Path(folder) / "adapter_config.json"
    if not file.is_file() or (Path(folder) / "config.json").is_file():
        return folder
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])


def keep(scores: Sequence[Score], home: Home, asked: Asked) -> None:
    """Store scores in the study of their checkpoint."""
    from autosft.studies.values import CheckpointScore

    study, record = home
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
        for score in scores
    )


def examples_of(metric: str, asked: Asked) -> str:
    """Name the examples that a score was computed on."""
    from autosft.studies.metrics import IFEVAL, METRICS, Evidence

    if metric in METRICS and METRICS[metric].evidence is Evidence.TOKENS:
        return asked.data or "final"
    if metric.startswith(IFEVAL):  # or measured beside it
        return asked.ifeval_data
    return metric


def as_plain(row: Row) -> dict[str, Any]:
    from autosft.studies.wire import to_plain

    return {
        "checkpoint": row.checkpoint,
        "study": row.study,
        "trial": row.trial,
        "step": row.step,
        **to_plain(row.score),
    }


def show(rows: Sequence[Row]) -> None:
    """Print a table of scores."""
    from autosft.ui.tables import new_table, show_table

    table = new_table()
    for heading in ("checkpoint", "metric", "value", "95 % interval", "examples", ""):
        table.add_column(
            heading, overflow="fold", justify="left" if heading in ("checkpoint", "") else "right"
        )
    for row in rows:
        score = row.score
        table.add_row(
            f"{row.study} trial {row.trial} step {row.step}" if row.study else row.checkpoint,
            score.metric,
            f"{score.value:.4g}",
            "" if score.low is None or score.high is None else f"{score.low:.4g} to {score.high:.4g}",
            "" if score.num_examples is None else f"{score.num_examples:,}",
            score.note,
        )
    show_table(table)
