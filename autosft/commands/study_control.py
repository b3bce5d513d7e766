"""`autosft studies pause | resume | stop | enqueue`: wishes for a study that runs in another process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autosft.commands.flags import with_setting_flags
from autosft.commands.options import AsJson, Command, Quiet, Storage, Study, teach, write_json

if TYPE_CHECKING:
    from autosft.studies.store.records import CommandKind, StudyOverview, StudyRecords

OneTrial = Annotated[
    int | None,
    typer.Option("--trial", metavar="N", help="This trial only; without it the whole study.", min=0),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `autosft studies`."""
    for name, function, summary, *examples in (
        (
            "pause",
            leaving("pause"),
            "Have a running study, or one of its trials, save a checkpoint and give its devices back.",
            "autosft studies pause demo             all of it",
            "autosft studies pause demo --trial 3   one trial, the others go on",
        ),
        (
            "resume",
            leaving("resume"),
            "Take a pause back; a trial that a rung has paused goes on at once.",
            "autosft studies resume demo --trial 3",
        ),
        (
            "stop",
            leaving("stop"),
            "End a running study with everything kept, or one of its trials with what it has measured.",
            "autosft studies stop demo             as Ctrl+C where it runs",
            "autosft studies stop demo --trial 3   counts as stopped",
        ),
        (
            "enqueue",
            enqueue,
            "Have a study try these settings next; those left out are as in its default.",
            "autosft studies enqueue demo --learning-rate 3e-4",
        ),
    ):
        app.command(name, cls=Command, help=teach(summary, *examples))(function)


def leaving(kind: str) -> Callable[..., None]:
    """Return the command that leaves a wish of this kind for a study or one of its trials."""

    def leave(
        study: Study,
        *,
        trial: OneTrial = None,
        storage: Storage = None,
        as_json: AsJson = False,
        quiet: Quiet = False,
    ) -> None:
        from autosft.studies.store.records import CommandKind

        send(CommandKind(kind), study, trial, storage=storage, as_json=as_json, quiet=quiet)

    return leave


@with_setting_flags
def enqueue(
    study: Study, *, storage: Storage = None, as_json: AsJson = False, quiet: Quiet = False, **given: Any
) -> None:
    """Enqueue settings."""
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
    """Check a wish and leave it for the process that runs the study.  Raises UserError."""
    from autosft.commands.databases import reading

    with reading(storage) as records:
        found = records.read_study(study)
        [overview] = [one for one in records.studies() if one.spec.name == study]
        is_running = lives(overview)
        parameters = None if values is None else checked(found, values)
        check(kind, found, trial, is_running=is_running)
        number = records.send_command(study, kind, trial=trial, parameters=parameters, now=time.time())
    if as_json:
        plain = {"study": study, "command": kind.value, "trial": trial, "parameters": parameters}
        write_json({**plain, "id": number, "is_running": is_running})
    elif not quiet:
        what = study if trial is None else f"{study}, trial {trial}"
        when = "done within seconds" if is_running else "it is not running: done once it runs again"
        typer.echo(f"{kind.value} {what}: {when}")


def lives(overview: StudyOverview) -> bool:
    """Whether a process runs the study, by its heartbeat."""
    from autosft.studies.store.driver_lease import HEARTBEAT_TIMEOUT_S

    if overview.driver is None or overview.heartbeat_at is None:
        return False
    return time.time() - overview.heartbeat_at < HEARTBEAT_TIMEOUT_S


def check(kind: CommandKind, study: StudyRecords, trial: int | None, *, is_running: bool) -> None:
    """Refuse what could not be done.  Raises UserError."""
    from autosft.profiles.errors import UserError
    from autosft.studies.store.records import CommandKind

    name, trials = study.spec.name, study.trials()
    if trial is None:
        if not is_running and kind is not CommandKind.ENQUEUE:
            raise UserError(
                f"Study {name!r} is not running, so there is nothing to {kind.value}.",
                remedy="Run its autosft tune command again to go on with it.",
            )
        return
    if trial >= len(trials):
        raise UserError(
            f"Study {name!r} has no trial {trial}; its trials are 0 to {len(trials) - 1}."
            if trials
            else f"Study {name!r} has no trials yet."
        )
    if trials[trial].state.is_over:
        raise UserError(f"Trial {trial} of study {name!r} is over: it is {trials[trial].state.value}.")


def checked(study: StudyRecords, values: dict[str, str]) -> dict[str, Any]:
    """Return settings as the study's search space has them.  Raises UserError."""
    from autosft.profiles.errors import UserError
    from autosft.studies.search.dimensions import Fixed
    from autosft.studies.search.parsing import parse_dimension
    from autosft.studies.search.space import complete

    if not values:
        raise UserError(
            "There is nothing to enqueue.", remedy="Give at least one setting, such as --learning-rate 3e-4."
        )
    given = {}
    for name, text in values.items():
        dimension = parse_dimension(name, text)
        if not isinstance(dimension, Fixed):
            raise UserError(f"--{name.replace('_', '-')} {text}: a trial takes one value of it.")
        given[name] = dimension.value
    complete(study.spec.space, given)
    return given
