"""Commands that are carried out by a server, with `--server URL` or AUTOSFT_SERVER."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from autosft.commands.options import STOPPED, write_json
from autosft.profiles.errors import StudyFailedError, UserError
from autosft.ui.queue_view import waiting_text

if TYPE_CHECKING:
    from autosft.service.client import Client

F = TypeVar("F", bound=Callable[..., Any])

Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="URL",
        envvar="AUTOSFT_SERVER",
        show_envvar=False,
        help="Have a server do it (autosft serve); default: AUTOSFT_SERVER.",
        rich_help_panel="Server",
    ),
]
#: Flags that say how an answer is shown here.
_SHOWN_HERE = ("as_json", "quiet", "server", "config")


def with_server(remotely: Callable[[Client, dict[str, Any], dict[str, Any]], None]) -> Callable[[F], F]:
    """Add `--server` to a command: with it, `remotely(client, given, all)` runs in its place.

    `given` are the flags that were given, `all` those with their defaults.
    """

    def add(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        parameters = [
            one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        own = [
            inspect.Parameter("server", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Server),
            inspect.Parameter("context_of_server", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        ]

        @wraps(command)
        def dispatched(*, context_of_server: typer.Context, server: str | None, **values: Any) -> Any:
            if not server or server == "none":
                return command(**values)
            from autosft.service.client import Client

            given = {
                name: value
                for name, value in values.items()
                if getattr(context_of_server.get_parameter_source(name), "name", "") == "COMMANDLINE"
            }
            with Client(server) as client:
                return remotely(client, given, values)

        dispatched.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
        return dispatched  # type: ignore[return-value]

    return add


# tune, train, evaluate


def run(command: str) -> Callable[[Client, dict[str, Any], dict[str, Any]], None]:
    """Return the function that queues a command, follows it, and ends as it would have alone."""

    def remotely(client: Client, given: dict[str, Any], values: dict[str, Any]) -> None:
        if values.get("dry_run"):
            raise UserError(
                "--dry-run plans on this machine.", remedy="autosft plan --server URL asks the server."
            )
        arguments, configuration = request_of(client, command, given)
        shown = client.submit(command, arguments, configuration=configuration)
        is_quiet = bool(values.get("quiet") or values.get("as_json"))
        if not is_quiet:
            typer.echo(f"{client.url}: item {shown['id']}, {shown['name']}. {waiting_text(shown)}")
        follow(client, shown["id"], is_quiet=is_quiet, as_json=bool(values.get("as_json")))

    return remotely


def request_of(client: Client, command: str, given: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a command's flags as a request: files that only this machine has are sent along, or refused."""
    arguments = {name: plain(value) for name, value in given.items() if name not in _SHOWN_HERE}
    if given.get("config") is not None:
        from autosft.studies.request import read_config

        fields = read_config(given["config"])
        arguments = {**fields.pop("space", {}), **fields, **arguments}
    if client.is_local:
        arguments = {name: here(name, value) for name, value in arguments.items()}
    configuration = None
    if command == "train" and (path := Path(str(arguments.get("file", "")))).is_file():
        configuration = path.read_text(encoding="utf-8")
        del arguments["file"]
    return arguments, configuration


def plain(value: Any) -> Any:
    """Return a flag's value as JSON has it."""
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def here(name: str, value: Any) -> Any:
    """Return paths in full, for a server on this machine."""
    from autosft.profiles.dataset.sources import in_full
    from autosft.profiles.sources import full_path

    if name in ("model", "ifeval_data", "file") and isinstance(value, str):
        return full_path(value)
    if name in ("data", "eval_data") and isinstance(value, str):
        return in_full(value)
    return [full_path(str(one)) for one in value] if name == "given_models" else value


def follow(client: Client, item: int, *, is_quiet: bool, as_json: bool = False) -> None:
    """Show what an item prints until it has ended, then end as it did.

    Ctrl+C ends the showing alone: the item goes on.
    """
    try:
        if is_quiet:
            client.wait(item)
        else:
            for text in client.follow(item):
                sys.stdout.write(text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo(f"\nIt goes on at {client.url}.  To end it: autosft queue cancel {item}", err=True)
        raise typer.Exit(STOPPED) from None
    shown = client.item(item)
    if as_json:
        write_json(shown)
    match shown["state"]:
        case "done":
            return
        case "refused":
            raise UserError(shown["note"])
        case "failed":
            raise StudyFailedError(f"{shown['name']} failed: {shown['note'] or 'its log says why'}")
        case _:
            raise typer.Exit(STOPPED)


# plan, studies, report, export


#: Flags of `plan` that a server is asked with.
_ASKED = frozenset(
    (
        *("model", "data", "seq_len", "method", "precision", "memory", "effective_batch_size", "epochs"),
        *("hardware", "as_json", "quiet"),
    )
)


def plan(client: Client, given: dict[str, Any], values: dict[str, Any]) -> None:
    """Ask whether it fits."""
    unknown = [name for name in given if name not in _ASKED]
    if unknown:
        raise UserError(
            f"--{unknown[0].replace('_', '-')} is not asked of a server.",
            remedy="Plan here with --server none, or leave it out.",
        )
    asked = {name: value for name, value in given.items() if name not in ("as_json", "quiet", "hardware")}
    if client.is_local:
        asked = {name: here(name, value) for name, value in asked.items()}
    answer = client.fits(**asked, device=given.get("hardware"))
    if values["as_json"]:
        write_json(answer)
        return
    for line in plan_lines(answer):
        typer.echo(line)


def plan_lines(answer: dict[str, Any]) -> list[str]:
    """Return an answer of `/fits` as lines."""
    from autosft.profiles.units import gib
    from autosft.studies.formatting import format_duration

    lines = [
        f"{answer['model']}: {answer['num_parameters']:,} parameters, length {answer['seq_len']}, on "
        f"{answer['num_devices']} x {answer['device']} ({gib(answer['usable_bytes'])} to use)"
    ]
    for method in answer["methods"]:
        way = method["way"]
        fits = "fits" if method["fits"] else "does not fit"
        devices = f" on each of {way['num_devices']}" if way["num_devices"] > 1 else ""
        lines.append(
            f"  {method['method']:6} {fits}: needs {gib(way['predicted_bytes'])} (at most "
            f"{gib(way['upper_bytes'])}){devices}, about {format_duration(way['seconds'])} (predicted)"
        )
        lines += [f"         would fit: {remedy['change']}" for remedy in method["would_fit"]]
    return lines


def list_studies(client: Client, _given: dict[str, Any], values: dict[str, Any]) -> None:
    """List the studies that a server has run, runs or will run."""
    from autosft.ui.queue_view import queue_table
    from autosft.ui.tables import show_table

    found = [item for item in client.items(limit=2000) if item["command"] == "tune"]
    if values["as_json"]:
        write_json(found)
    elif values["quiet"]:
        for item in found:
            typer.echo(item["name"])
    else:
        show_table(queue_table(found))


def show_study(client: Client, _given: dict[str, Any], values: dict[str, Any]) -> None:
    """Show a study's trials."""
    from autosft.studies.formatting import format_metric
    from autosft.ui.tables import new_table, show_table

    item = client.find(values["study"])
    found = client.trials(item["id"])
    if values["as_json"]:
        write_json({"item": item, **found})
        return
    table = new_table()
    for heading in ("#", "state", found["metric"], "step", "origin"):
        table.add_column(heading)
    for trial in found["trials"]:
        table.add_row(
            str(trial["number"]),
            trial["state"],
            format_metric(trial["value"]),
            "" if trial["step"] is None else str(trial["step"]),
            trial["origin"],
        )
    show_table(table)


def command_study(kind: str) -> Callable[[Client, dict[str, Any], dict[str, Any]], None]:
    """Return the function that pauses, resumes or stops a study or a trial on a server."""

    def remotely(client: Client, _given: dict[str, Any], values: dict[str, Any]) -> None:
        item, trial = client.find(values["study"]), values.get("trial")
        path = kind if trial is None else f"trials/{trial}/{kind}"
        sent = client.act(item["id"], path)
        _tell_sent(kind, item, sent, values)

    return remotely


def enqueue(client: Client, given: dict[str, Any], values: dict[str, Any]) -> None:
    """Have a study on a server try settings next."""
    item = client.find(values["study"])
    own = ("study", "storage", "as_json", "quiet")
    settings = {name: value for name, value in given.items() if name not in own}
    if not settings:
        raise UserError(
            "No settings were given.", remedy="Give at least one setting, such as --learning-rate 3e-4."
        )
    _tell_sent("enqueue", item, client.enqueue(item["id"], settings), values)


def _tell_sent(kind: str, item: dict[str, Any], sent: dict[str, Any], values: dict[str, Any]) -> None:
    if values["as_json"]:
        write_json({"study": item["name"], "command": kind, **sent})
    elif not values["quiet"]:
        when = "takes effect within seconds" if sent["is_running"] else "takes effect when it runs again"
        typer.echo(f"{kind} {item['name']}: {when}")


def report(client: Client, _given: dict[str, Any], values: dict[str, Any]) -> None:
    """Write the report that a server makes; it has no answers of models."""
    from autosft.commands.options import folder_of

    path = (values["output"] or Path("report.html")).expanduser()
    folder_of(path)
    path.write_text(client.report(client.find(values["study"])["id"]), encoding="utf-8")
    typer.echo(path if values["quiet"] else f"Report on {values['study']}: {path}")


def export(client: Client, given: dict[str, Any], values: dict[str, Any]) -> None:
    """Write the best configuration of a study on a server."""
    other = [name for name in given if name not in ("study", "output", "quiet", "as_json")]
    if other:
        raise UserError(
            f"--{other[0].replace('_', '-')}: of a server, a study's best.yaml alone is exported.",
            remedy="autosft queue files STUDY lists its checkpoints, which can be downloaded.",
        )
    path = (values["output"] or Path("best.yaml")).expanduser()
    path.write_text(client.export(client.find(values["study"])["id"]), encoding="utf-8")
    typer.echo(path if values["quiet"] else f"Exported {values['study']}: {path}")
