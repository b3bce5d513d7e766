"""`autosft submit`: runs autosft on an existing Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosft.commands.clusters import Insecure, OptionalAddress, follow
from autosft.commands.options import AsJson, Command, Quiet, application, teach, write_json
from autosft.commands.remote import Server
from autosft.commands.submissions import Options
from autosft.profiles.errors import UserError

app = application()

#: Commands that make sense on a cluster's head node.
COMMANDS = ("tune", "train", "plan", "profile", "data", "studies")


@app.command(
    "submit",
    cls=Command,
    context_settings={"ignore_unknown_options": True},
    help=teach(
        "Run a command on an existing Ray cluster, or put it into the queue of a server.",
        "autosft submit --address 10.0.0.5:8265 -- tune --model /shared/llama --data /shared/chats.jsonl \\",
        "    --storage postgresql://ada@db/studies --output /shared/studies",
        "autosft submit --address 127.0.0.1:8265 --working-dir . --follow -- tune --config study.yaml",
        "autosft submit --server http://127.0.0.1:8090 --not-before 22:00 -- tune --config study.yaml",
        "autosft submit --server http://127.0.0.1:8090 --batch night.yaml",
    ),
    epilog="The nodes need autosft's dependencies (torch, transformers, trl, ray, ...).  Ray's token is read "
    "from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.",
)
def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="COMMAND...", help="After --: a command with its flags.", show_default=False),
    ] = None,
    *,
    address: OptionalAddress = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Send this folder and run the command in it. At most 99 MiB."),
    ] = None,
    follow_logs: Annotated[
        bool, typer.Option("--follow", help="Follow the job's output until it ends.")
    ] = False,
    insecure: Insecure = False,
    server: Server = None,
    batch: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Queue every entry of this YAML file.", rich_help_panel="Server"),
    ] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(metavar="ITEM", help="Start after this; may be repeated.", rich_help_panel="Server"),
    ] = None,
    not_before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Start at the earliest at 22:00, or in +2h.", rich_help_panel="Server"
        ),
    ] = None,
    priority: Annotated[
        int,
        typer.Option(metavar="N", help="Highest first; above 0 only as admin.", rich_help_panel="Server"),
    ] = 0,
    hold: Annotated[
        bool, typer.Option("--hold", help="Hold it until it is released.", rich_help_panel="Server")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a command on an existing Ray cluster, or put it into the queue of a server."""
    if address is None:
        options = Options(
            after=tuple(after or ()),
            not_before=not_before,
            priority=priority,
            hold=hold,
            as_json=as_json,
            quiet=quiet,
        )
        submit_to_server(server, command, batch, options, follow_logs=follow_logs)
        return
    require_none_of_a_server(batch, after, not_before, priority, hold)
    if not command:
        raise UserError("No command was given.", remedy="Write it after --: -- tune --model ...")
    arguments = on_cluster(command, working_dir)

    from autosft.profiles.units import gib
    from autosft.scheduler.cluster.submission import connect

    jobs = connect(address, insecure=insecure)
    job, package = jobs.submit(arguments, folder=working_dir)
    if as_json:
        write_json(
            {
                "job": job,
                "address": address,
                "command": arguments,
                "num_bytes": package.num_bytes,
                "left_out": package.left_out,
            }
        )
    elif quiet:
        typer.echo(job)
    else:
        files = f" and {package.num_files:,} files of yours" if package.num_files else ""
        typer.echo(f"Sent autosft{files}, {gib(package.num_bytes)}, as job {job}.")
        if package.left_out:
            typer.echo(f"Not sent, as it may hold secrets: {', '.join(package.left_out)}.")
        if not follow_logs:
            typer.echo(f"Follow it with: autosft jobs logs {job} --follow --address {address}")
    if follow_logs:
        raise typer.Exit(follow(jobs, job))


def submit_to_server(
    server: str | None, command: list[str] | None, batch: Path | None, options: Options, *, follow_logs: bool
) -> None:
    """Queue a command, or a batch, and follow it if asked."""
    from autosft.commands.remote import follow as followed
    from autosft.commands.submissions import submit_batch, submit_command, tell_all
    from autosft.service.client import Client

    if not server or server == "none":
        raise UserError(
            "Neither a cluster nor a server was given.",
            remedy="--address HOST:PORT of a Ray cluster, or --server URL of autosft serve.",
        )
    if (batch is None) == (not command):
        raise UserError("Give either --batch FILE or a command after --.")
    with Client(server) as client:
        if batch is not None:
            found = submit_batch(client, batch, options)
        else:
            found = [submit_command(client, command or [], options)]
        tell_all(found, options)
        for shown in found if follow_logs else ():
            followed(client, shown["id"], is_quiet=options.quiet or options.as_json)


def require_none_of_a_server(*given: object) -> None:
    """Raise UserError for flags that a Ray cluster does not know."""
    if any(given):
        raise UserError(
            "--batch, --after, --not-before, --priority and --hold are for the queue of a server.",
            remedy="Leave them out, or give --server URL in place of --address.",
        )


def on_cluster(command: list[str], folder: Path | None) -> list[str]:
    """Return the command as it runs on the head node.

    Raises UserError for a command that cannot run there and for local files that are not sent along.
    """
    name, *arguments = command
    if name not in COMMANDS:
        raise UserError(f"{name!r} cannot be sent to a cluster.", remedy=f"Send {', '.join(COMMANDS)}.")
    if folder is None:
        for argument in arguments:
            value = argument.partition("=")[2] if argument.startswith("-") else argument
            if value and not Path(value).is_absolute() and Path(value).exists():
                raise UserError(
                    f"{value} is a local file that the cluster's nodes do not have.",
                    remedy="Send it along with --working-dir ., or give a path that all nodes can read.",
                )
    given = [argument.partition("=")[0] for argument in arguments]
    return [*command, "--address", "auto"] if name == "tune" and "--address" not in given else command
