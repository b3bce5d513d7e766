"""`autosft train`: one configuration, without a search."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from autosft.commands.options import STOPPED, AsJson, Command, Hardware, Quiet, application, teach

app = application()


@app.command(
    "train",
    cls=Command,
    help=teach(
        "Train one configuration again, such as the best.yaml of a study.",
        "autosft train best.yaml --output my-model",
    ),
    epilog="On the machine of the study the evaluation loss comes out the same.",
)
def train(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="best.yaml of a study.", show_default=False)],
    *,
    hardware: Hardware = "auto",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the trained model goes; beside FILE if not given."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train one configuration again, such as the best.yaml of a study."""
    from autosft.commands.watching import choose_output

    with closing(choose_output(as_json=as_json, quiet=quiet)) as show:
        from autosft.commands.stopping import StopSwitch
        from autosft.output import training_facts
        from autosft.scheduler.events import StudyEvent, TrialStarted
        from autosft.scheduler.training_run import train_file

        with StopSwitch(on_abort=show.abandon) as stop:

            def observe(event: StudyEvent) -> None:
                if isinstance(event, TrialStarted):
                    stop.guard()
                show(event)

            result = train_file(
                file, hardware=hardware, output=output, observe=observe, stop_requested=stop.requested
            )
            show.conclude(result, heading=f"trained {file}", facts=training_facts(result))
    if not result.is_complete:
        raise typer.Exit(STOPPED)
