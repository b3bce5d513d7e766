"""Shared by `autosft submit` and `autosft jobs`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autosft.commands.options import STOPPED

if TYPE_CHECKING:
    from autosft.scheduler.cluster.submission import Jobs

Address = Annotated[
    str,
    typer.Option(metavar="HOST:PORT", help="The cluster's dashboard (default port: 8265), or its URL."),
]
OptionalAddress = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="The cluster's dashboard (default port: 8265), or its URL."),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Use a cluster without a token that other machines can reach."),
]


def follow(jobs: Jobs, job: str) -> int:
    """Print a job's output until it ends; return its exit code.  Ctrl+C does not stop the job."""
    try:
        for text in jobs.stream_output(job):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        typer.echo(
            f"\nThe job continues.  To stop it: autosft jobs stop {job} --address {jobs.address}",
            err=True,
        )
        return STOPPED
    ended = jobs.get(job)
    if ended.status == "SUCCEEDED":
        return 0
    [why, *_] = [*ended.message.splitlines(), ""]  # the rest repeats the log
    typer.echo(f"Job {job} {ended.status.lower()}. {why.partition(', last available logs')[0]}", err=True)
    return STOPPED if ended.status == "STOPPED" else ended.exit_code or 1
