"""`autosft export`: the best configuration in another tool's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from autosft.commands.options import AsJson, Command, Quiet, Storage, Study, application, teach, write_json
from autosft.profiles.errors import UserError
from autosft.studies.export.formats import (
    FORMATS,
    Content,
    ExportFormat,
    find_format,
    formats_with,
    formats_with_launcher,
)

if TYPE_CHECKING:
    from autosft.scheduler.finish.export import Exported
    from autosft.studies.store.study_records import StudyRecords
    from autosft.studies.trial import TrialRecord

app = application()

Launcher = Literal["python", "torchrun", "accelerate"]


@app.command(
    "export",
    cls=Command,
    help=teach(
        "Export a study's best configuration for autosft, another tool, or the hub.",
        "autosft export demo --output best.yaml                      for autosft train, anywhere",
        "autosft export demo --format trl --output run               for trl sft --config",
        "autosft export demo --format script --launcher torchrun --output run",
        "autosft export demo --format hub --merge --output my-model  weights and a model card",
    ),
    epilog="Formats with data contain the examples in training order, so that the loss curve is the same.",
)
def export(
    study: Study,
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
        bool, typer.Option("--merge", help="hub: merge the adapter into its base model.")
    ] = False,
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros", help="With --merge: preserve the zeros of a pruned base model.")
    ] = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Export a study's best configuration for autosft, another tool, or the hub."""
    from autosft.commands.databases import reading
    from autosft.studies.files.checkpoints import slug

    chosen_format = find_format(to)
    if merge and chosen_format.content is not Content.WEIGHTS:
        names = " or ".join(formats_with(Content.WEIGHTS))
        raise UserError(f"--merge with --format {to}.", remedy=f"Only --format {names} writes weights.")
    if launcher != "python" and not chosen_format.has_launcher:
        names = " and ".join(formats_with_launcher())
        raise UserError(
            f"--launcher {launcher} with --format {to}: the tool starts itself.",
            remedy=f"Remove it; it applies to the script of {names} only.",
        )
    if keep_zeros and not merge:
        raise UserError("--keep-zeros without --merge.", remedy="Only merging an adapter fills zeros.")
    with reading(storage) as records:
        found = records.read_study(study)
        chosen = choose_trial(found, trial)
        folder = (output or Path(f"{slug(study)}-{to}")).expanduser()
        written = write(
            found, chosen, chosen_format, folder, launcher=launcher, merge=merge, keep_zeros=keep_zeros
        )
    if as_json:
        write_json(
            {"study": study, "trial": chosen.number, "format": to, "output": str(written.folder)}
            | {"command": written.command, "notes": list(written.notes)}
        )
    elif quiet:
        typer.echo(written.folder)
    else:
        for note in written.notes:
            typer.echo(note)
        typer.echo(f"Trial {chosen.number} of {study}: {written.folder}\nNext: {written.command}")


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
    return f"These have been: {', '.join(evaluated[:20])}." if evaluated else "None has been so far."


def known_tokens(study: StudyRecords, trial: TrialRecord) -> str:
    """Return the fingerprint of the trial's training tokens; empty if its data is not on this machine."""
    from autosft.profiles.dataset.prepared import load_prepared, tokens_fingerprint
    from autosft.scheduler.finish.inference_client import prepared_folder

    try:
        data = load_prepared(prepared_folder(study.spec))
    except UserError:
        return ""
    return tokens_fingerprint(data, trial.settings.max_rounds)


def write(
    study: StudyRecords,
    trial: TrialRecord,
    to: ExportFormat,
    output: Path,
    *,
    launcher: Launcher,
    merge: bool,
    keep_zeros: bool,
) -> Exported:
    from autosft.scheduler.finish.export import export_config, export_for_hub, export_for_tool
    from autosft.studies.export import exported

    config = exported(study.spec, trial, tokens_fingerprint=known_tokens(study, trial))
    if to.content is Content.CONFIG:
        return export_config(config, output)
    if to.content is Content.DATA:
        trusted = study.spec.trust_remote_code
        return export_for_tool(config, to.name, output, launcher=launcher, trust_remote_code=trusted)
    from autosft.scheduler.finish.inference_client import models_of_study
    from autosft.studies.report import report_of
    from autosft.studies.report.facts import sentences

    [checkpoint] = models_of_study(study, (str(trial.number),))
    said = list(sentences(report_of(study, database="", now=0.0)))
    return export_for_hub(
        config,
        Path(checkpoint.source),
        output,
        merge=merge,
        keep_zeros=keep_zeros,
        trust_remote_code=study.spec.trust_remote_code,
        sentences=said,
    )
