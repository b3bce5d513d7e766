"""`autosft doctor`: what slows fine-tuning down or breaks it on this machine, with remedies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autosft.commands.options import AsJson, Command, Quiet, application, teach, write_json

app = application()


@app.command(
    "doctor",
    cls=Command,
    help=teach(
        "Check driver, torch, free memory, power, links and settings: a line each, with a remedy.",
        "autosft doctor",
        "autosft doctor --gpus 0,1,2,3     also measures the links between GPUs",
    ),
    epilog="Exit code 1 if a finding would make trials fail.  Tested on Linux only.",
)
def doctor(
    *,
    gpus: Annotated[
        str | None, typer.Option(metavar="GPUS", help="Check only these GPUs and measure their links: 0,1.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check driver, torch, free memory, power, links and settings: a line each, with a remedy."""
    import platformdirs

    from autosft.profiles.hardware.benchmark import measure_cluster
    from autosft.profiles.hardware.doctor import examine, gpus_of, several_gpus
    from autosft.profiles.hardware.findings import Level
    from autosft.profiles.hardware.machine import read_machine
    from autosft.studies.wire import to_plain

    folders = [Path(platformdirs.user_data_dir("autosft")), Path(platformdirs.user_cache_dir("autosft"))]
    machine = read_machine(gpus=gpus, folders=folders)
    findings = examine(machine)
    if gpus is not None and machine.cluster is not None and len(gpus_of(machine)) > 1:
        measured = measure_cluster(machine.cluster, say=lambda line: typer.echo(line, err=True))
        findings += several_gpus(measured.devices, machine.links)
    if as_json:
        write_json(to_plain(findings))
    else:
        for finding in findings:
            if quiet and finding.level in (Level.OK, Level.NOTE):
                continue
            typer.echo(f"{finding.level.value:<8} {finding.topic:<13} {finding.message}")
            if finding.remedy and finding.level is not Level.OK:
                typer.echo(f"{'':<22} {finding.remedy}")
    if any(finding.level is Level.PROBLEM for finding in findings):
        raise typer.Exit(1)
