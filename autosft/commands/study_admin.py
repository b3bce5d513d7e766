"""`autosft studies compare|rename|delete|export-csv`: comparing and managing studies."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from autosft.commands.options import (
    AsJson,
    Command,
    Quiet,
    Storage,
    Study,
    application,
    folder_of,
    teach,
    write_json,
)

if TYPE_CHECKING:
    from autosft.studies.report.comparison import ComparedStudy

app = application()


@app.command(
    "compare",
    cls=Command,
    help=teach(
        "Compare studies: their best trials and the difference between them.",
        "autosft studies compare llama-lora llama-full",
        "autosft studies compare mine-1 mine-2 mine-3    # of tune --fold 1/3, 2/3, 3/3: cross-validation",
    ),
)
def compare_studies(
    studies: Annotated[
        list[str], typer.Argument(metavar="STUDY...", help="Two or more studies.", show_default=False)
    ],
    *,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare studies: their best trials and the difference between them."""
    from autosft.commands.databases import reading
    from autosft.profiles.errors import UserError
    from autosft.studies.files.study_folder import bring_here
    from autosft.studies.report.comparison import compare_studies as side_by_side
    from autosft.studies.report.comparison import folds_of
    from autosft.studies.results.folds import describe_folds

    if len(set(studies)) < 2:
        raise UserError("Only one study was given.", remedy="Name two or more: autosft studies list.")
    with reading(storage) as records:
        found = [records.read_study(name) for name in dict.fromkeys(studies)]
        for study in found:
            bring_here(study.spec.store_url, Path(study.spec.output_dir))
        compared, folds = side_by_side(found), folds_of(found)
    if as_json:
        write_json([compared_as_plain(other) for other in compared])
        return
    show_compared(compared)
    if folds is not None:
        typer.echo(f"\n{describe_folds(folds)}")
    elif not quiet:
        typer.echo()
        for other in compared[1:]:
            typer.echo(describe_difference(compared[0], other))


def compared_as_plain(compared: ComparedStudy) -> dict[str, Any]:
    """Return a compared study as plain JSON."""
    from autosft.studies.wire import to_plain

    spec, best = compared.spec, compared.best
    return {
        "study": spec.name,
        "model": spec.model,
        "data": spec.data,
        "metric": spec.metric,
        "num_finished": compared.num_finished,
        "num_trials": spec.num_trials,
        "best_trial": None if best is None else best.number,
        "best_value": None if best is None else best.value,
        "best_step": None if best is None else best.best_step,
        "best_parameters": {} if best is None else dict(best.parameters),
        "interval": to_plain(compared.interval),
        "training_s": compared.training_s,
        "gain_over_first": to_plain(compared.gain),
        "why_no_gain": compared.why_no_gain,
    }


def show_compared(compared: tuple[ComparedStudy, ...]) -> None:
    """Print the table of compared studies."""
    from autosft.studies.formatting import format_duration, format_settings
    from autosft.studies.results.final_scores import with_half
    from autosft.ui.tables import new_table, short_source, show_table

    table = new_table()
    for heading in ("study", "best", "trial", "finished", "trained", "settings", "model", "data"):
        table.add_column(heading, overflow="fold")
    for study in compared:
        spec, best = study.spec, study.best
        has_value = best is not None and best.value is not None
        table.add_row(
            spec.name,
            f"{spec.metric} {with_half(best.value or 0.0, study.interval)}" if best and has_value else "none",
            "" if best is None else f"{best.number} step {best.best_step}",
            f"{study.num_finished}/{spec.num_trials}",
            format_duration(study.training_s),
            "" if best is None else format_settings(best.parameters, {}),
            short_source(spec.model),
            short_source(spec.data),
        )
    show_table(table)


def describe_difference(first: ComparedStudy, other: ComparedStudy) -> str:
    """Describe how the best trials of two studies differ, or why they cannot be compared."""
    from autosft.studies.formatting import format_number

    names = f"{other.spec.name} against {first.spec.name}"
    if other.gain is None:
        return f"{names}: not comparable, {other.why_no_gain}."
    half = (other.gain.high - other.gain.low) / 2
    change = "lower" if other.gain.nats_per_token >= 0 else "higher"
    verdict = "a tie, " if other.gain.is_tie else ""
    return (
        f"{names}: {verdict}loss {change} by {format_number(abs(other.gain.nats_per_token))} ± "
        f"{format_number(half)} nats per token "
        f"(95 % interval over {other.gain.num_examples} examples, paired)."
    )


@app.command(
    "rename",
    cls=Command,
    help=teach("Rename a study and its folder.", "autosft studies rename demo first-try"),
)
def rename_study(
    study: Study,
    new_name: Annotated[str, typer.Argument(metavar="NAME", help="New name.", show_default=False)],
    *,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Rename a study and its folder."""
    from autosft.commands.databases import reading

    with reading(storage) as records:
        folder = records.rename_study(study, new_name, now=time.time())
    if as_json:
        write_json({"study": new_name, "was": study, "folder": None if folder is None else str(folder)})
    elif not quiet:
        where = f"its files are in {folder}" if folder else "its files are not on this machine"
        typer.echo(f"{study} is now {new_name}; {where}.")


@app.command(
    "delete",
    cls=Command,
    help=teach(
        "Delete a study with its records, files and checkpoints.",
        "autosft studies delete demo",
        "autosft studies delete demo --yes      without confirmation, for scripts",
    ),
    epilog="Files in the folder that autosft did not write are kept and listed.",
)
def delete_study(
    study: Study,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Skip the confirmation.")] = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Delete a study with its records, files and checkpoints."""
    from autosft.commands.databases import reading
    from autosft.profiles.errors import UserError
    from autosft.profiles.units import gib
    from autosft.studies.files.remote import is_url
    from autosft.studies.files.study_folder import folder_of as folder_of_study
    from autosft.studies.files.study_folder import is_our_checkpoint, outside, size_of

    with reading(storage) as records:
        found = records.read_study(study)
        folder = folder_of_study(found.spec.output_dir, study)
        what = f"{len(found.trials())} trials and {gib(size_of(folder))} of files"
        if folder is not None:
            what += f" in {folder}"
        here = [one.path for one in found.checkpoints() if not is_url(one.path)]
        if elsewhere := [path for path in outside(folder, here) if is_our_checkpoint(path, study)]:
            what += f", and outside of it {', '.join(map(str, elsewhere))}"
        if found.spec.store_url:
            what += f", and everything at {found.spec.store_url}"
        if not yes:
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise UserError(f"Deleting {study} would remove {what}.", remedy="Confirm with --yes.")
            typer.confirm(f"Delete study {study}, {what}?", abort=True)
        removed = records.delete_study(study, now=time.time())
    if as_json:
        write_json({"deleted": study, "freed_bytes": removed.num_bytes, "left": list(removed.left)})
    elif not quiet:
        typer.echo(f"Deleted {study}, freed {gib(removed.num_bytes)}.")
        for path in removed.left:
            typer.echo(f"kept, not written by autosft: {path}")


@app.command(
    "export-csv",
    cls=Command,
    help=teach(
        "Export a study's trials as CSV, one row per trial.",
        "autosft studies export-csv demo --output demo.csv",
    ),
)
def export_csv(
    study: Study,
    *,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output file; default: the terminal.")
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Export a study's trials as CSV, one row per trial."""
    from autosft.commands.databases import reading
    from autosft.studies.report.comparison import trials_as_rows

    if output is not None:
        folder_of(output)
    with reading(storage) as records:
        found = records.read_study(study)
        table = trials_as_rows(found.spec, found.trials())
    if as_json:
        from autosft.studies.wire import to_plain

        write_json([to_plain(row) for row in table])
        return
    if output is None:
        write_csv(sys.stdout, table)
        return
    with output.open("w", encoding="utf-8", newline="") as file:
        write_csv(file, table)
    if not quiet:
        typer.echo(f"Wrote {len(table)} trials to {output}")


def write_csv(stream: TextIO, table: list[dict[str, Any]]) -> None:
    """Write rows that share their columns."""
    if table:
        writer = csv.DictWriter(stream, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
