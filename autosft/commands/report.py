"""`autosft report`: a study as a single HTML file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autosft.commands import remote
from autosft.commands.options import (
    AsJson,
    Command,
    Quiet,
    Storage,
    Study,
    TrustRemoteCode,
    application,
    folder_of,
    teach,
    write_json,
)
from autosft.commands.remote import with_server
from autosft.profiles.errors import UserError
from autosft.ui.terminal import share_bar

if TYPE_CHECKING:
    from autosft.studies.report import Answer
    from autosft.studies.store.study_records import StudyRecords

app = application()


@app.command(
    "report",
    cls=Command,
    help=teach(
        "Write a study's report as one HTML file that works offline.",
        "autosft report demo --output demo.html",
    ),
    epilog="Works while the study is running, too.",
)
@with_server(remote.report)
def report(
    study: Study,
    *,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output file; default: report.html.")
    ] = None,
    answers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Include the base and the best model's answers to N evaluation examples.",
        ),
    ] = 4,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Maximum length of an answer.")
    ] = 128,
    trust_remote_code: TrustRemoteCode = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a study's report as one HTML file that works offline."""
    from autosft.commands.databases import reading
    from autosft.studies.files.study_folder import bring_here
    from autosft.studies.report import report_of, write_report

    path = (output or Path("report.html")).expanduser()
    folder_of(path)
    with reading(storage) as records:
        found = records.read_study(study)
        bring_here(found.spec.store_url, Path(found.spec.output_dir))
        if answers and not quiet and not as_json:
            said = f"Asking the untuned and the best model {answers} questions; --answers 0 skips that."
            typer.echo(said, err=True)
        with share_bar("answers", is_quiet=quiet or as_json or not answers) as tell:
            samples, missing = sample_answers(
                found,
                answers,
                max_new_tokens=max_new_tokens,
                trust_remote_code=trust_remote_code,
                on_share=tell,
            )
        write_report(path, report_of(found, database=records.url, answers=samples, now=time.time()))
    if missing and not quiet:
        typer.echo(f"No answers in the report: {missing}", err=True)
    if as_json:
        write_json({"study": study, "report": str(path), "bytes": path.stat().st_size})
    elif quiet:
        typer.echo(path)
    else:
        typer.echo(f"Report on {study}: {path} ({path.stat().st_size / 1e6:.1f} MB, works offline)")


def sample_answers(
    study: StudyRecords,
    num: int,
    *,
    max_new_tokens: int,
    trust_remote_code: bool,
    on_share: Callable[[float], object],
) -> tuple[tuple[Answer, ...], str | None]:
    """Return answers of the base and the best model, or the reason why there are none."""
    if num == 0:
        return (), None
    from autosft.scheduler.finish.inference_client import InferenceClient, models_of_study, prepared_folder

    try:
        models = models_of_study(study, ("base", "best"))
        data = prepared_folder(study.spec)
        with InferenceClient(models, trust_remote_code=trust_remote_code) as answering:
            return answering.samples(data, num, max_new_tokens=max_new_tokens, on_share=on_share), None
    except UserError as error:
        return (), str(error)
