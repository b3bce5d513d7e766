"""`autosft jobs`: jobs on a Ray cluster."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from autosft.commands.clusters import Address, Insecure, follow
from autosft.commands.options import AsJson, Command, Quiet, application, teach, write_json

if TYPE_CHECKING:
    from autosft.scheduler.cluster.submission import Job

app = application()

Id = Annotated[str, typer.Argument(metavar="JOB", help="Job id.", show_default=False)]


@app.callback()
def jobs() -> None:
    """List, follow and stop jobs on a Ray cluster."""


@app.command(
    "list",
    cls=Command,
    help=teach(
        "List autosft's jobs on a cluster, latest first.", "autosft jobs list --address 10.0.0.5:8265"
    ),
)
def list_jobs(
    *, address: Address, insecure: Insecure = False, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """List autosft's jobs on a cluster, latest first."""
    from autosft.scheduler.cluster.submission import connect

    found = connect(address, insecure=insecure).all()
    if as_json:
        write_json([asdict(job) for job in found])
    elif quiet:
        for job in found:
            typer.echo(job.id)
    else:
        for job in found:
            typer.echo(f"{job.id}  {describe_job(job)}  autosft {job.command}")
        if not found:
            typer.echo(f"{address} has no autosft jobs.")


@app.command(
    "status",
    cls=Command,
    help=teach(
        "Show a job's status.", "autosft jobs status raysubmit_4LamXRuQpYdSMg7J --address 10.0.0.5:8265"
    ),
)
def status(
    job: Id, *, address: Address, insecure: Insecure = False, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Show a job's status."""
    from autosft.scheduler.cluster.submission import connect

    found = connect(address, insecure=insecure).get(job)
    if as_json:
        write_json(asdict(found))
    elif quiet:
        typer.echo(found.status)
    else:
        typer.echo(f"{found.id}  {describe_job(found)}  autosft {found.command}")
        if found.message:
            typer.echo(found.message)


@app.command(
    "logs",
    cls=Command,
    help=teach(
        "Show a job's output.",
        "autosft jobs logs raysubmit_4LamXRuQpYdSMg7J --follow --address 10.0.0.5:8265",
    ),
)
def logs(
    job: Id,
    *,
    address: Address,
    follow_logs: Annotated[bool, typer.Option("--follow", help="Follow until the job ends.")] = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,  # noqa: ARG001  # for consistency; there is nothing to suppress
) -> None:
    """Show a job's output."""
    from autosft.scheduler.cluster.submission import connect

    found = connect(address, insecure=insecure)
    if follow_logs and not as_json:
        raise typer.Exit(follow(found, job))
    text = found.logs(job)
    if as_json:
        write_json({"job": job, "logs": text})
    elif text:
        typer.echo(text, nl=not text.endswith("\n"))


@app.command(
    "stop",
    cls=Command,
    help=teach(
        "Stop a job; its study can be resumed.",
        "autosft jobs stop raysubmit_4LamXRuQpYdSMg7J --address 10.0.0.5:8265",
    ),
)
def stop(
    job: Id, *, address: Address, insecure: Insecure = False, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Stop a job; its study can be resumed."""
    from autosft.scheduler.cluster.submission import connect

    was_running = connect(address, insecure=insecure).stop(job)
    if as_json:
        write_json({"job": job, "was_running": was_running})
    elif not quiet:
        typer.echo(f"Asked job {job} to stop." if was_running else f"Job {job} had already ended.")


def describe_job(job: Job) -> str:
    """Describe a job's state and since when it has had it."""
    if job.started_at is None:
        return job.status.lower()
    when = job.ended_at if job.is_over and job.ended_at else job.started_at
    return f"{job.status.lower()} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))}"
