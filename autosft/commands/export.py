"""`autosft export`: the best configuration in another tool's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from autosft.commands import remote
from autosft.commands.options import (
    AsJson,
    Command,
    Quiet,
    Storage,
    TrustRemoteCode,
    application,
    teach,
    write_json,
)
from autosft.commands.remote import with_server
from autosft.profiles.errors import UserError
from autosft.studies.export.formats import (
    FORMATS,
    Content,
    ExportFormat,
    find_format,
    formats_with,
    formats_with_dtype,
    formats_with_launcher,
)

if TYPE_CHECKING:
    from autosft.scheduler.finish.export import Exported
    from autosft.studies.export import ExportedConfig
    from autosft.studies.store.study_records import StudyRecords
    from autosft.studies.trial import TrialRecord

app = application()

Launcher = Literal["python", "torchrun", "accelerate"]
Dtype = Literal["f32", "f16", "bf16", "q8_0"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The flags of the command that change what is written."""

    launcher: Launcher = "python"
    merge: bool = False
    keep_zeros: bool = False
    dtype: Dtype | None = None


@app.command(
    "export",
    cls=Command,
    help=teach(
        "Export a study's best configuration for autosft or another tool, or a model's weights.",
        "autosft export demo --output best.yaml                      for autosft train, anywhere",
        "autosft export demo --format trl --output run               for trl sft --config",
        "autosft export demo --format script --launcher torchrun --output run",
        "autosft export demo --format hub --merge --output my-model  weights and a model card",
        "autosft export demo --format gguf --output my-gguf          for llama.cpp and Ollama",
        "autosft export demo --format gguf-adapter --output my-lora  the adapter alone, for llama.cpp",
        "autosft export ./my-model --format vllm --output served     a folder's weights, with the command",
    ),
    epilog="Formats with data contain the examples in training order, so that the loss curve is the same.  "
    "Exported weights are compared with the trained model before the export succeeds.",
)
@with_server(remote.export)
def export(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY|PATH",
            help="A study; or a run's, checkpoint's, adapter's or model's folder, or a best.yaml.",
            show_default=False,
        ),
    ],
    *,
    output: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="New folder, or for autosft a file; default: STUDY-FORMAT."),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            help="; ".join(f"{row.name}: {row.summary}" for row in FORMATS.values()) + ".",
        ),
    ] = "autosft",
    trial: Annotated[str, typer.Option(metavar="N|best", help="Trial to export.")] = "best",
    launcher: Annotated[
        Launcher,
        typer.Option(help=f"Launcher for the script of --format {' or '.join(formats_with_launcher())}."),
    ] = "python",
    merge: Annotated[
        bool,
        typer.Option("--merge", help="hub, vllm: merge the adapter into its base model (gguf always does)."),
    ] = False,
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros", help="With --merge: preserve the zeros of a pruned base model.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--dtype",
            help="Of the weights of whole models, by default the base model's, and of gguf-adapter, by "
            "default f32.  q8_0: gguf only.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Export a study's best configuration for autosft or another tool, or a model's weights."""
    from autosft.workers.tools.scratch import stopped_by_signals

    chosen = find_format(to)
    asked = Asked(launcher=launcher, merge=merge, keep_zeros=keep_zeros, dtype=dtype)
    require_together(chosen, asked)
    with stopped_by_signals():
        trial_number, written = written_to(
            study, trial, chosen, output, asked, storage=storage, trust_remote_code=trust_remote_code
        )
    if as_json:
        write_json(
            {"study": study, "trial": trial_number, "format": to, "output": str(written.folder)}
            | {"command": written.command, "notes": list(written.notes)}
        )
    elif quiet:
        typer.echo(written.folder)
    else:
        for note in written.notes:
            typer.echo(note)
        what = study if trial_number is None else f"Trial {trial_number} of {study}"
        typer.echo(f"{what}: {written.folder}\nNext: {written.command}")


def written_to(
    study: str,
    trial: str,
    to: ExportFormat,
    output: Path | None,
    asked: Asked,
    *,
    storage: str | None,
    trust_remote_code: bool,
) -> tuple[int | None, Exported]:
    """Export what the command names; return the trial's number, None without one, and what was written."""
    from autosft.studies.files.checkpoints import slug

    path = Path(study).expanduser()
    named = path.resolve().stem if path.exists() else study
    place = (output or Path(f"{slug(named)}-{to.name}")).expanduser()
    if not path.exists():
        return write_study(study, trial, to, place, asked, storage=storage)
    if trial != "best":
        raise UserError(f"--trial {trial}: {study} is a path.", remedy="Name the study to choose a trial.")
    return write_path(study, to, place, asked, storage=storage, trust_remote_code=trust_remote_code)


def require_together(to: ExportFormat, asked: Asked) -> None:
    """Raise UserError for flags that do not apply to a format."""
    if asked.merge and to.content is not Content.WEIGHTS:
        names = " or ".join(formats_with(Content.WEIGHTS))
        raise UserError(f"--merge with --format {to.name}.", remedy=f"Only --format {names} writes weights.")
    if asked.dtype is not None and asked.dtype not in to.dtypes:
        names = " or ".join(formats_with_dtype(asked.dtype))
        raise UserError(
            f"--dtype {asked.dtype} with --format {to.name}.", remedy=f"It applies to --format {names}."
        )
    if asked.launcher != "python" and not to.has_launcher:
        names = " and ".join(formats_with_launcher())
        raise UserError(
            f"--launcher {asked.launcher} with --format {to.name}: the tool starts itself.",
            remedy=f"Remove it; it applies to the script of {names} only.",
        )
    if asked.merge and to.name == "gguf-adapter":
        raise UserError(
            "--merge with --format gguf-adapter.", remedy="--format gguf merges the adapter into its base."
        )
    if asked.keep_zeros and not asked.merge:
        raise UserError("--keep-zeros without --merge.", remedy="Only merging an adapter fills zeros.")
    if asked.keep_zeros and to.name != "hub":
        raise UserError(
            f"--keep-zeros with --format {to.name}.", remedy="It applies to --format hub --merge."
        )


def write_path(
    given: str,
    to: ExportFormat,
    output: Path,
    asked: Asked,
    *,
    storage: str | None,
    trust_remote_code: bool,
) -> tuple[int | None, Exported]:
    """Export what a path names: the weights that the resolver finds, or the trial that they belong to.

    Returns the trial's number, None without one, and what was written.  Raises UserError.
    """
    from autosft.commands.databases import known_studies
    from autosft.scheduler.finish.export import export_config, export_for_tool
    from autosft.scheduler.finish.given_models import Kind, resolve_model
    from autosft.studies.files.study_folder import fetched_with_progress

    with known_studies(storage) as studies:
        model = resolve_model(given, studies)
        if to.is_of_weights_alone:
            folder = fetched_with_progress(model.source)
            return None, write_folder(folder, to, output, asked, trust_remote_code=trust_remote_code)
        is_best = model.kind in (Kind.RUN, Kind.CONFIG)  # and no checkpoint of its own
        if (
            model.study is not None
            and model.trial is not None
            and (is_best or to.content is not Content.WEIGHTS)
        ):
            chosen = choose_trial(model.study, str(model.trial))
            return chosen.number, write(model.study, chosen, to, output, asked)
    if model.config is not None and to.content is Content.CONFIG:
        return model.config.trial, export_config(model.config, output)
    if model.config is not None and to.content is Content.DATA:
        written = export_for_tool(
            model.config, to.name, output, launcher=asked.launcher, trust_remote_code=trust_remote_code
        )
        return model.config.trial, written
    return None, write_folder(Path(model.source), to, output, asked, trust_remote_code=trust_remote_code)


def write_folder(
    folder: Path, to: ExportFormat, output: Path, asked: Asked, *, trust_remote_code: bool
) -> Exported:
    """Export the weights in a folder, without a study.  Raises UserError for formats that need one."""
    from autosft.scheduler.finish.export_served import export_served
    from autosft.scheduler.finish.weights import weights_in

    if not to.is_of_weights_alone:
        raise UserError(
            f"--format {to.name}: {folder} is here, and only a study has a configuration.",
            remedy="Name the study, or use --format gguf, gguf-adapter or vllm.",
        )
    weights = weights_in(folder, trust_remote_code=trust_remote_code)
    return export_served(weights, to.name, output, merge=asked.merge, dtype=asked.dtype)


def write_study(
    name: str, trial: str, to: ExportFormat, output: Path, asked: Asked, *, storage: str | None
) -> tuple[int, Exported]:
    """Export a trial of a study; return its number and what was written."""
    from autosft.commands.databases import reading

    with reading(storage) as records:
        study = records.read_study(name)
        chosen = choose_trial(study, trial)
        return chosen.number, write(study, chosen, to, output, asked)


def choose_trial(study: StudyRecords, wanted: str) -> TrialRecord:
    """Return the trial of `--trial`.  Raises UserError if it has not been evaluated."""
    from autosft.studies.results.summary import best_trial
    from autosft.studies.values import Direction

    trials = study.trials()
    if wanted == "best":
        best = best_trial(trials, maximize=study.spec.direction is Direction.MAXIMIZE)
        if best is None:
            raise UserError(f"no trial of study {study.spec.name!r} has been evaluated yet.")
        return best
    if not wanted.isdigit() or int(wanted) >= len(trials):
        raise UserError(
            f"--trial {wanted}: study {study.spec.name!r} has trials 0 to {len(trials) - 1}.",
            remedy="Choose one of them, or --trial best.",
        )
    if trials[int(wanted)].value is None:
        raise UserError(f"--trial {wanted} has not been evaluated.", remedy=best_remedy(trials))
    return trials[int(wanted)]


def best_remedy(trials: Sequence[TrialRecord]) -> str:
    evaluated = [str(trial.number) for trial in trials if trial.value is not None]
    return (
        f"These have been: {', '.join(evaluated[:20])}."
        if evaluated
        else "No trial has been evaluated so far."
    )


def known_tokens(study: StudyRecords, trial: TrialRecord) -> str:
    """Return the fingerprint of the trial's training tokens; empty if its data is not on this machine."""
    from autosft.profiles.dataset.prepared import load_prepared, tokens_fingerprint
    from autosft.scheduler.finish.inference_client import prepared_folder

    try:
        data = load_prepared(prepared_folder(study.spec))
    except UserError:
        return ""
    return tokens_fingerprint(data, trial.settings.max_rounds)


def write(study: StudyRecords, trial: TrialRecord, to: ExportFormat, output: Path, asked: Asked) -> Exported:
    from autosft.scheduler.finish.export import export_config, export_for_tool
    from autosft.studies.export import exported

    config = exported(study.spec, trial, tokens_fingerprint=known_tokens(study, trial))
    if to.content is Content.CONFIG:
        return export_config(config, output)
    if to.content is Content.DATA:
        trusted = study.spec.trust_remote_code
        return export_for_tool(config, to.name, output, launcher=asked.launcher, trust_remote_code=trusted)
    return write_weights_of(study, trial, to, output, asked=asked, config=config)


def write_weights_of(
    study: StudyRecords,
    trial: TrialRecord,
    to: ExportFormat,
    output: Path,
    *,
    asked: Asked,
    config: ExportedConfig,
) -> Exported:
    """Export a trial's best checkpoint."""
    from autosft.scheduler.finish.export import export_for_hub, require_mergeable
    from autosft.scheduler.finish.export_served import export_served
    from autosft.scheduler.finish.inference_client import base_of, models_of_study
    from autosft.scheduler.finish.weights import Weights
    from autosft.studies.files.checkpoints import slug
    from autosft.studies.report import report_of
    from autosft.studies.report.facts import sentences

    [checkpoint] = models_of_study(study, (str(trial.number),))
    is_adapter = config.settings.adapter is not None
    needs_base = is_adapter and (asked.merge or to.name != "hub")
    weights = Weights(
        name=slug(study.spec.name),
        checkpoint=Path(checkpoint.source),
        base=base_of(study.spec) if needs_base else study.spec.model,
        is_adapter=is_adapter,
        trust_remote_code=study.spec.trust_remote_code,
    )
    require_mergeable(config, merge=asked.merge or (to.name == "gguf" and is_adapter))
    if to.is_of_weights_alone:
        return export_served(weights, to.name, output, merge=asked.merge, dtype=asked.dtype)
    return export_for_hub(
        config,
        weights,
        output,
        merge=asked.merge,
        keep_zeros=asked.keep_zeros,
        dtype=asked.dtype,
        sentences=list(sentences(report_of(study, database="", now=0.0))),
    )
