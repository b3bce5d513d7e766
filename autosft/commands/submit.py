"""`autosft submit`: runs autosft on an existing Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosft.commands.clusters import Address, Insecure, follow
from autosft.commands.options import AsJson, Command, Quiet, application, teach, write_json
from autosft.profiles.errors import UserError

app = application()

#: Commands that make sense on a cluster's head node.
COMMANDS = ("tune", "train", "plan", "profile", "data", "studies")


@app.command(
    "submit",
    cls=Command,
    context_settings={"ignore_unknown_options": True},
    help=teach(
        "Run a command on an existing Ray cluster; this version of autosft is sent along.",
        "autosft submit --address 10.0.0.5:8265 -- tune --model /shared/llama --data /shared/chats.jsonl \\",
        "    --storage postgresql://ada@db/studies --output /shared/studies",
        "autosft submit --address 127.0.0.1:8265 --working-dir . --follow -- tune --config study.yaml",
    ),
    epilog="The nodes need autosft's dependencies (torch, transformers, trl, ray, ...).  Ray's token is read "
    "from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.",
)
def submit(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="After --: a command with its flags.", show_default=False),
    ],
    *,
    address: Address,
    working_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Send this folder and run the command in it. At most 99 MiB."),
    ] = None,
    follow_logs: Annotated[
        bool, typer.Option("--follow", help="Follow the job's output until it ends.")
    ] = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a command on an existing Ray cluster; this version of autosft is sent along."""
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
