"""`autosft tune`: from a request to the best checkpoint."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autosft.commands.flags import as_request_fields, with_request_flags
from autosft.commands.memory_offers import AnswerYes, with_offers
from autosft.commands.options import STOPPED, AsJson, Command, Quiet, application, teach
from autosft.commands.remote import run as on_server
from autosft.commands.remote import with_server
from autosft.profiles.errors import InterruptedRunError, StudyFailedError, UserError
from autosft.studies.files.study_folder import EXPORTS
from autosft.studies.request import TuneRequest, read_request

if TYPE_CHECKING:
    from autosft.scheduler.events import Observer
    from autosft.scheduler.finish.conclusion import Conclusion

app = application()

Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="YAML file with any of these flags; flags override it.", rich_help_panel="Study"
    ),
]

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything and show the plan, on any known device, without starting a trial.",
        rich_help_panel="Study",
    ),
]


@app.command(
    "tune",
    cls=Command,
    help=teach(
        "Find the best fine-tuning run for a model and a data set on this machine.",
        "autosft tune                                      the built-in demo",
        "autosft tune --model ./llama --data chats.jsonl   your model and data",
        "autosft tune --config study.yaml --trials 24      settings from a file",
        "autosft tune --config study.yaml --dry-run        the plan alone",
    ),
    epilog="Run the same command again to resume the study.  Ctrl+C once stops it and keeps everything.",
)
@with_server(on_server("tune"))
@with_request_flags
def tune(
    *,
    config: Config = None,
    take_offer: AnswerYes = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    **given: Any,
) -> None:
    """Find the best fine-tuning run for a model and a data set on this machine."""
    request = read_request(as_request_fields(given), config)
    work = preview if dry_run else run
    is_left = with_offers(request, take_offer, lambda asked: work(asked, as_json=as_json, quiet=quiet))
    if is_left:
        raise typer.Exit(STOPPED)


def preview(request: TuneRequest, *, as_json: bool, quiet: bool) -> bool:
    """Show the plan of the study without starting it; return False, as nothing is left to resume."""
    from autosft.commands.choose_output import choose_output

    with closing(choose_output(as_json=as_json, quiet=quiet, is_live=False)) as output, stdout_kept(as_json):
        from autosft.scheduler.setup.preview import preview_study

        preview_study(request, observe=output)
    return False


def run(request: TuneRequest, *, as_json: bool, quiet: bool) -> bool:
    """Run and show the study; return whether the user stopped it before its end.

    Raises StudyFailedError where it is over and no trial has a result.
    """
    from autosft.commands.choose_output import choose_output

    # Before the imports that take a second, so that the user sees something immediately.
    with closing(choose_output(as_json=as_json, quiet=quiet)) as output, stdout_kept(as_json):
        from autosft.commands.stopping import StopSwitch
        from autosft.profiles.hardware.discover import refresh
        from autosft.scheduler.finish.conclusion import conclude
        from autosft.scheduler.finish.final_evaluation import score_best
        from autosft.scheduler.finish.untuned_score import AgainstUntuned, score_untuned
        from autosft.scheduler.loop.tuning import run_study
        from autosft.scheduler.observers.advisor import Advisor
        from autosft.scheduler.observers.notifications import notifying
        from autosft.scheduler.setup.open_study import open_study
        from autosft.ui.output import conclusion_facts

        with (
            StopSwitch(on_abort=output.abandon) as stop,
            notifying(request.notify, output) as observe,
            open_study(request, observe=observe) as study,
        ):
            stop.guard(study.runner)
            compared = AgainstUntuned(study, observe)
            with interrupted_by_database():
                score_untuned(study, observe=compared, stop_requested=stop.requested)
                tally = run_study(
                    study.run,
                    records=study.records,
                    runner=study.runner,
                    leases=study.leases,
                    observe=Advisor(
                        study.records,
                        compared,
                        cluster=study.hardware,
                        refresh=refresh,
                        now=study.runner.now,
                    ),
                    stop_requested=stop.requested,
                    devices=study.devices,
                )
                score_best(study, observe=observe, stop_requested=stop.requested)
                result = conclude(study, tally)
            output.conclude(result, heading=f"study {result.study}", facts=conclusion_facts(result))
        if request.export is not None and result.is_complete and not stop.requested():
            export_best(request, result, observe=output)
    is_left = stop.requested() or tally.was_stopped
    if result.no_result and not is_left:
        raise StudyFailedError(result.no_result)
    return is_left and not result.is_complete


def export_best(request: TuneRequest, result: Conclusion, *, observe: Observer) -> None:
    """Export the best trial into the study's folder, once; report where it is.

    Raises StudyFailedError if that fails: the study itself is complete.
    """
    from autosft.commands.export import Asked, write_study
    from autosft.scheduler.events import Note
    from autosft.studies.export.formats import find_format
    from autosft.workers.tools.scratch import stopped_by_signals

    if request.export is None or result.best_trial is None or result.best_yaml is None:
        return
    name = f"trial-{result.best_trial:04d}-step-{result.best_step or 0:06d}"
    folder, trial = result.best_yaml.parent / EXPORTS / name, str(result.best_trial)
    if any(folder.glob("*.gguf")):
        observe(Note(message=f"Trial {trial} is exported already: {folder}"))
        return
    observe(Note(message=f"Exporting trial {trial} as GGUF, compared with what was trained"))
    try:
        with stopped_by_signals():
            _, written = write_study(
                result.study, trial, find_format(request.export), folder, Asked(), storage=request.storage
            )
    except UserError as error:
        again = f"autosft export {result.study} --format {request.export}"
        raise StudyFailedError(
            f"the study is complete, but its best trial could not be exported: {error}\nAgain with: {again}"
        ) from error
    for note in written.notes:
        observe(Note(message=note))
    observe(Note(message=f"Exported trial {trial}: {written.folder}"))
    observe(Note(message=f"Next: {written.command}"))


@contextlib.contextmanager
def interrupted_by_database() -> Iterator[None]:
    """Tell a database that goes away under a study from one that was named wrongly."""
    from autosft.studies.store.database import DatabaseError

    try:
        yield
    except DatabaseError as error:
        raise InterruptedRunError(str(error)) from error


@contextlib.contextmanager
def stdout_kept(is_kept: bool) -> Iterator[None]:
    """Keep standard output for JSON lines: what code of a user's prints in this process goes to the other."""
    if not is_kept:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
