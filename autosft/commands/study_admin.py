"""`autosft studies compare|rename|delete|export-csv`: studies side by side, and keeping them in order."""

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
        "Show studies side by side: their best trials, and by how much they differ.",
        "autosft studies compare llama-lora llama-full",
    ),
)
def compare_studies(
    studies: Annotated[
        list[str], typer.Argument(metavar="STUDY...", help="Two names or more.", show_default=False)
    ],
    *,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show studies side by side: their best trials, and by how much they differ."""
    from autosft.commands.databases import reading
    from autosft.profiles.errors import UserError
    from autosft.studies.files.study_folder import bring_here
    from autosft.studies.report.comparison import compare_studies as side_by_side

    if len(set(studies)) < 2:
        raise UserError("There is one study only.", remedy="Name two or more: autosft studies list.")
    with reading(storage) as records:
        found = [records.read_study(name) for name in dict.fromkeys(studies)]
        for study in found:
            bring_here(study.spec.store_url, Path(study.spec.output_dir))
        compared = side_by_side(found)
    if as_json:
        write_json([compared_as_plain(one) for one in compared])
        return
    show_compared(compared)
    if not quiet:
        typer.echo()
        for one in compared[1:]:
            typer.echo(difference_words(compared[0], one))


def compared_as_plain(one: ComparedStudy) -> dict[str, Any]:
    """Return a compared study as plain JSON."""
    from autosft.studies.wire import to_plain

    spec, best = one.spec, one.best
    return {
        "study": spec.name,
        "model": spec.model,
        "data": spec.data,
        "metric": spec.metric,
        "num_finished": one.num_finished,
        "num_trials": spec.num_trials,
        "best_trial": None if best is None else best.number,
        "best_value": None if best is None else best.value,
        "best_step": None if best is None else best.best_step,
        "best_parameters": {} if best is None else dict(best.parameters),
        "interval": to_plain(one.interval),
        "training_s": one.training_s,
        "gain_over_first": to_plain(one.gain),
        "why_no_gain": one.why_no_gain,
    }


def show_compared(compared: tuple[ComparedStudy, ...]) -> None:
    """Write the table of compared studies."""
    from autosft.studies.formatting import format_duration, format_settings
    from autosft.studies.results.final_scores import with_half
    from autosft.ui.tables import new_table, short_source, show_table

    table = new_table()
    for heading in ("study", "best", "trial", "finished", "trained", "settings", "model", "data"):
        table.add_column(heading, overflow="fold")
    for one in compared:
        spec, best = one.spec, one.best
        has_value = best is not None and best.value is not None
        table.add_row(
            spec.name,
            f"{spec.metric} {with_half(best.value or 0.0, one.interval)}" if best and has_value else "none",
            "" if best is None else f"{best.number} step {best.best_step}",
            f"{one.num_finished}/{spec.num_trials}",
            format_duration(one.training_s),
            "" if best is None else format_settings(best.parameters, {}),
            short_source(spec.model),
            short_source(spec.data),
        )
    show_table(table)


def difference_words(first: ComparedStudy, other: ComparedStudy) -> str:
    """Say how two studies' best trials differ, or why that cannot be said."""
    from autosft.studies.formatting import format_number

    names = f"{other.spec.name} against {first.spec.name}"
    if other.gain is None:
        return f"{names}: not comparable, {other.why_no_gain}."
    half = (other.gain.high - other.gain.low) / 2
    change = "lower" if other.gain.nats_per_token >= 0 else "higher"
    verdict = "a tie, " if other.gain.is_tie else ""
    return (
        f"{names}: {verdict}loss {change} by {format_number(abs(other.gain.nats_per_token))} ± "
        f"{format_number(half)} nats a token (95 % interval over {other.gain.num_examples} examples, paired)."
    )


@app.command(
    "rename",
    cls=Command,
    help=teach("Give a study another name, and its folder with it.", "autosft studies rename demo first-try"),
)
def rename_study(
    study: Study,
    new_name: Annotated[str, typer.Argument(metavar="NAME", help="Its new name.", show_default=False)],
    *,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Give a study another name, and its folder with it."""
    from autosft.commands.databases import reading

    with reading(storage) as records:
        folder = records.rename_study(study, new_name, now=time.time())
    if as_json:
        write_json({"study": new_name, "was": study, "folder": None if folder is None else str(folder)})
    elif not quiet:
        where = f"its files are in {folder}" if folder else "its files are not on this machine and stay"
        typer.echo(f"{study} is now {new_name}; {where}.")


@app.command(
    "delete",
    cls=Command,
    help=teach(
        "Delete a study: its records and its files, checkpoints included.",
        "autosft studies delete demo",
        "autosft studies delete demo --yes      without being asked, in scripts",
    ),
    epilog="Files in its folder that autosft did not write stay, and are listed.",
)
def delete_study(
    study: Study,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Delete a study: its records and its files, checkpoints included."""
    from autosft.commands.databases import reading
    from autosft.profiles.errors import UserError
    from autosft.profiles.units import gib
    from autosft.studies.files.study_folder import folder_of as folder_of_study
    from autosft.studies.files.study_folder import size_of

    with reading(storage) as records:
        found = records.read_study(study)
        folder = folder_of_study(found.spec.output_dir, study)
        what = f"{len(found.trials())} trials and {gib(size_of(folder))} of files"
        if folder is not None:
            what += f" in {folder}"
        if found.spec.store_url:
            what += f", and everything at {found.spec.store_url}"
        if not yes:
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise UserError(f"Deleting {study} takes {what} away.", remedy="Say so with --yes.")
            typer.confirm(f"Delete study {study}, {what}?", abort=True)
        removed = records.delete_study(study, now=time.time())
    if as_json:
        write_json({"deleted": study, "freed_bytes": removed.num_bytes, "left": list(removed.left)})
    elif not quiet:
        typer.echo(f"Deleted {study}; {gib(removed.num_bytes)} given back.")
        for path in removed.left:
            typer.echo(f"not autosft's, left: {path}")


@app.command(
    "export-csv",
    cls=Command,
    help=teach(
        "Write a study's trials as a table, one row a trial.",
        "autosft studies export-csv demo --output demo.csv",
    ),
)
def export_csv(
    study: Study,
    *,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; the terminal if not given.")
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a study's trials as a table, one row a trial."""
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
        typer.echo(f"{len(table)} trials in {output}")


def write_csv(stream: TextIO, table: list[dict[str, Any]]) -> None:
    """Write rows of the same columns."""
    if table:
        writer = csv.DictWriter(stream, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
