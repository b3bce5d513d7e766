"""`autosft train`: one configuration, without a search."""

from __future__ import annotations

import re
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from autosft.commands.options import (
    STOPPED,
    AsJson,
    Command,
    Hardware,
    Quiet,
    Storage,
    application,
    teach,
    write_json,
)

if TYPE_CHECKING:
    from autosft.scheduler.train.overrides import Overrides

app = application()

PrecisionName = Literal["fp32", "bf16-autocast", "fp16-autocast", "bf16", "fp16"]
ScalingName = Literal["linear", "sqrt", "none"]


@app.command(
    "train",
    cls=Command,
    help=teach(
        "Train one configuration again, such as the best.yaml of a study.",
        "autosft train best.yaml --output my-model",
        "autosft train best.yaml --model ./llama --data ./chats.jsonl   where they are on this machine",
        "autosft train best.yaml --gpus 0,1                             on two GPUs, with the same result",
        "autosft train best.yaml --hardware A100-80GB --dry-run         how it would run there",
    ),
    epilog="Micro batch, accumulation and checkpointing are planned for the devices here; the effective "
    "batch and all else that changes the loss are kept.  The same command goes on where it was stopped.",
)
def train(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="best.yaml of a study.", show_default=False)],
    *,
    hardware: Hardware = "auto",
    gpus: Annotated[
        str | None, typer.Option(metavar="2,3", help="Train on these GPUs together, by index.")
    ] = None,
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="Train on so many GPUs together, those with most memory free.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the trained model goes; beside FILE if not given."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_HUB_ID", help="The same model, where it is here."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH_OR_HUB_ID", help="The same data, where it is here.")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(metavar="PATH_OR_HUB_ID", help="The same evaluation data, likewise.")
    ] = None,
    ifeval_data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_HUB_ID", help="IFEval's same prompts, likewise; none: they are not asked."
        ),
    ] = None,
    precision: Annotated[
        PrecisionName | None,
        typer.Option(help="Compute in this instead, where a device lacks the study's."),
    ] = None,
    effective_batch_size: Annotated[
        int | None, typer.Option(help="Train with another effective batch; changes the result.")
    ] = None,
    scale_lr: Annotated[
        ScalingName, typer.Option("--scale-lr", help="How the learning rate follows it.")
    ] = "none",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how it would run, on any known device, and end.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a hub model.")
    ] = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train one configuration again, such as the best.yaml of a study."""
    from autosft.commands.choose_output import choose_output

    refuse_url(output)
    overrides = overrides_of(
        model,
        data,
        eval_data,
        ifeval_data,
        precision,
        effective_batch_size,
        scale_lr,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        from autosft.scheduler.train.training_run import Devices, plan_file
        from autosft.studies.wire import to_plain
        from autosft.ui.output import PlainLines

        lines = PlainLines(sys.stdout, quiet=quiet or as_json)
        devices = Devices(hardware=hardware, gpus=gpus, num_gpus=num_gpus)
        planned = plan_file(file, devices=devices, overrides=overrides, observe=lines, storage=storage)
        if as_json:
            write_json(to_plain(planned))
        elif quiet:
            number = f"{len(planned.devices)} x " if len(planned.devices) > 1 else ""
            typer.echo(f"fits {number}{planned.devices[0].name}")
        return
    with closing(choose_output(as_json=as_json, quiet=quiet)) as show:
        from autosft.commands.stopping import StopSwitch
        from autosft.scheduler.events import StudyEvent, TrialStarted
        from autosft.scheduler.train.training_run import Devices, train_file
        from autosft.ui.output import training_facts

        with StopSwitch(on_abort=show.abandon) as stop:

            def observe(event: StudyEvent) -> None:
                if isinstance(event, TrialStarted):
                    stop.guard()
                show(event)

            result = train_file(
                file,
                output=output,
                observe=observe,
                devices=Devices(hardware=hardware, gpus=gpus, num_gpus=num_gpus),
                overrides=overrides,
                storage=storage,
                stop_requested=stop.requested,
            )
            show.conclude(result, heading=f"trained {file}", facts=training_facts(result))
    if not result.is_complete:
        raise typer.Exit(STOPPED)


def overrides_of(
    model: str | None,
    data: str | None,
    eval_data: str | None,
    ifeval_data: str | None,
    precision: PrecisionName | None,
    effective_batch_size: int | None,
    scale_lr: ScalingName,
    *,
    trust_remote_code: bool,
) -> Overrides:
    from autosft.profiles.recipe import Precision
    from autosft.scheduler.train.overrides import LearningRateScaling, Overrides

    return Overrides(
        model=model,
        data=data,
        eval_data=eval_data,
        ifeval_data=ifeval_data,
        precision=None if precision is None else Precision(precision),
        effective_batch_size=effective_batch_size,
        scale_lr=LearningRateScaling(scale_lr),
        trust_remote_code=trust_remote_code,
    )


def refuse_url(output: Path | None) -> None:
    """Raise UserError for --output at a URL, whose slashes the path has joined."""
    from autosft.profiles.errors import UserError

    if output is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(output)):
        raise UserError(
            f"--output {output}: one training run writes to a folder of this machine.",
            remedy="Give a folder and copy it when it is done; autosft tune --output takes URLs.",
        )
