"""`autosft studies pause|resume|stop|enqueue`: commands for a study that runs in another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autosft.commands import remote
from autosft.commands.flags import with_setting_flags
from autosft.commands.options import AsJson, Command, Quiet, Storage, Study, teach, write_json
from autosft.commands.remote import with_server

if TYPE_CHECKING:
    from autosft.studies.store.records import CommandKind

OneTrial = Annotated[
    int | None,
    typer.Option("--trial", metavar="N", help="Only this trial; default: the whole study.", min=0),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `autosft studies`."""
    for name, function, summary, *examples in (
        (
            "pause",
            command_for("pause"),
            "Pause a running study or one of its trials: save a checkpoint and free its devices.",
            "autosft studies pause demo             the whole study",
            "autosft studies pause demo --trial 3   a single trial",
        ),
        (
            "resume",
            command_for("resume"),
            "Resume a paused study or trial; a trial paused at a rung is promoted.",
            "autosft studies resume demo --trial 3",
        ),
        (
            "stop",
            command_for("stop"),
            "Stop a running study, keeping everything, or one of its trials, keeping its results.",
            "autosft studies stop demo             like Ctrl+C in its terminal",
            "autosft studies stop demo --trial 3   the trial counts as stopped",
        ),
        (
            "enqueue",
            enqueue,
            "Make a study try these settings next; the others are those of its default configuration.",
            "autosft studies enqueue demo --learning-rate 3e-4",
        ),
    ):
        app.command(name, cls=Command, help=teach(summary, *examples))(function)


def command_for(kind: str) -> Callable[..., None]:
    """Return the function that sends this kind of command to a study or one of its trials."""

    @with_server(remote.command_study(kind))
    def send_command(
        study: Study,
        *,
        trial: OneTrial = None,
        storage: Storage = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
    ) -> None:
        from autosft.studies.store.records import CommandKind

        send(CommandKind(kind), study, trial, storage=storage, as_json=as_json, quiet=quiet)

    return send_command


@with_server(remote.enqueue)
@with_setting_flags
def enqueue(
    study: Study, *, storage: Storage = None, as_json: AsJson = False, quiet: Quiet = False, **given: Any
) -> None:
    """Enqueue a trial with these settings."""
    from autosft.studies.store.records import CommandKind

    used = {name: value for name, value in given.items() if value is not None}
    send(CommandKind.ENQUEUE, study, None, storage=storage, as_json=as_json, quiet=quiet, values=used)


def send(
    kind: CommandKind,
    study: str,
    trial: int | None,
    *,
    storage: str | None,
    as_json: bool,
    quiet: bool,
    values: dict[str, str] | None = None,
) -> None:
    """Check a command and store it for the process that runs the study.  Raises UserError."""
    from autosft.commands.databases import reading
    from autosft.studies.store.user_commands import checked_settings, is_alive, require_possible

    with reading(storage) as records:
        found = records.read_study(study)
        is_running = is_alive(records.overview(study), now=time.time())
        parameters = None if values is None else checked_settings(found, values)
        require_possible(kind, found, trial, is_running=is_running)
        number = records.send_command(study, kind, trial=trial, parameters=parameters, now=time.time())
    if as_json:
        plain = {"study": study, "command": kind.value, "trial": trial, "parameters": parameters}
        write_json({**plain, "id": number, "is_running": is_running})
    elif not quiet:
        what = study if trial is None else f"{study}, trial {trial}"
        when = "takes effect within seconds" if is_running else "takes effect when the study runs again"
        typer.echo(f"{kind.value} {what}: {when}")
