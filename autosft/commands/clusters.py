"""What `autosft submit` and `autosft jobs` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autosft.commands.options import STOPPED

if TYPE_CHECKING:
    from autosft.scheduler.cluster.submission import Jobs

Address = Annotated[
    str,
    typer.Option(metavar="HOST:PORT", help="The cluster's dashboard, port 8265 by default; or its URL."),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Use a cluster that asks for no token though others can reach it."),
]


def follow(jobs: Jobs, job: str) -> int:
    """Write what a job writes until it ends; return its exit code.  Ctrl+C leaves the job alone."""
    try:
        for text in jobs.stream_output(job):
            typer.echo(text, nl=False)
    except KeyboardInterrupt:
        typer.echo(
            f"\nThe job goes on.  Stop it with: autosft jobs stop {job} --address {jobs.address}", err=True
        )
        return STOPPED
    ended = jobs.get(job)
    if ended.status == "SUCCEEDED":
        return 0
    [why, *_] = [*ended.message.splitlines(), ""]  # behind it comes the log once more
    typer.echo(f"Job {job} {ended.status.lower()}. {why.partition(', last available logs')[0]}", err=True)
    return STOPPED if ended.status == "STOPPED" else ended.exit_code or 1
