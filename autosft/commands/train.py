"""`autosft train`: trains a single configuration, without a search."""

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
from autosft.commands.remote import run as on_server
from autosft.commands.remote import with_server

if TYPE_CHECKING:
    from autosft.scheduler.events import Observer
    from autosft.scheduler.train.overrides import Overrides

app = application()

PrecisionName = Literal["fp32", "bf16-autocast", "fp16-autocast", "bf16", "bf16-stochastic", "fp16"]
ScalingName = Literal["linear", "sqrt", "none"]


@app.command(
    "train",
    cls=Command,
    help=teach(
        "Train a single configuration, such as a study's best.yaml.",
        "autosft train best.yaml --output my-model",
        "autosft train best.yaml --model ./llama --data ./chats.jsonl   if they have moved",
        "autosft train best.yaml --gpus 0,1                             on two GPUs, with the same result",
        "autosft train best.yaml --hardware A100-80GB --dry-run         how it would run on that GPU",
    ),
    epilog="Micro batch, accumulation and checkpointing are planned for this machine; the effective batch "
    "and everything else that changes the loss stay the same.  Run the same command again to resume.",
)
@with_server(on_server("train"))
def train(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A study's best.yaml.", show_default=False)],
    *,
    hardware: Hardware = "auto",
    gpus: Annotated[
        str | None, typer.Option(metavar="2,3", help="Train on these GPUs together, by index.")
    ] = None,
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="Train on N GPUs together, those with the most free memory.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the trained model; default: next to FILE."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_HUB_ID", help="Location of the model, if it has moved."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH_OR_HUB_ID", help="Location of the data, if it has moved.")
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_HUB_ID", help="Location of the evaluation data, if it has moved."),
    ] = None,
    ifeval_data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_HUB_ID",
            help="Location of the IFEval prompts, if they have moved; none skips them.",
        ),
    ] = None,
    precision: Annotated[
        PrecisionName | None,
        typer.Option(help="Precision to use instead, if the device does not support the study's."),
    ] = None,
    memory: Annotated[
        Literal["exact", "lean", "leanest"],
        typer.Option(help="Hold weights and moments in fewer bits than FILE; changes the result."),
    ] = "exact",
    effective_batch_size: Annotated[
        int | None, typer.Option(help="Train with a different effective batch size; changes the result.")
    ] = None,
    scale_lr: Annotated[
        ScalingName, typer.Option("--scale-lr", help="How the learning rate is scaled with it.")
    ] = "none",
    export: Annotated[
        Literal["gguf"] | None,
        typer.Option(
            "--export",
            help="Export the trained model for llama.cpp and Ollama into the folder `exports` of --output; "
            "whether it can be is checked before training.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show how it would run, on any known device, without training.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that comes with a hub model, or that FILE names."),
    ] = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a single configuration, such as a study's best.yaml."""
    from autosft.commands.choose_output import choose_output

    refuse_url(output)
    overrides = overrides_of(
        model=model,
        data=data,
        eval_data=eval_data,
        prompts=ifeval_data,
        precision=precision,
        memory=memory,
        effective_batch_size=effective_batch_size,
        scale_lr=scale_lr,
        trust_remote_code=trust_remote_code,
    )
    if dry_run:
        from autosft.scheduler.train.training_run import Devices, plan_file
        from autosft.studies.wire import to_plain
        from autosft.ui.output import PlainLines

        lines = PlainLines(sys.stdout, quiet=quiet or as_json)
        devices = Devices(hardware=hardware, gpus=gpus, num_gpus=num_gpus)
        planned = plan_file(
            file, devices=devices, overrides=overrides, observe=lines, storage=storage, export=export
        )
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
                export=export,
                stop_requested=stop.requested,
            )
            show.conclude(result, heading=f"trained {file}", facts=training_facts(result))
        if export is not None and result.model is not None:
            export_model(result.model, export, trust_remote_code=trust_remote_code, observe=show)
    if not result.is_complete:
        raise typer.Exit(STOPPED)


def export_model(model: Path, to: str, *, trust_remote_code: bool, observe: Observer) -> None:
    """Export a trained model into its folder, once; report where it is.

    Raises StudyFailedError if that fails: the model itself is trained.
    """
    from autosft.profiles.errors import StudyFailedError, UserError
    from autosft.scheduler.events import Note
    from autosft.scheduler.finish.export_served import export_served
    from autosft.scheduler.finish.weights import weights_in
    from autosft.studies.files.study_folder import EXPORTS
    from autosft.workers.tools.scratch import stopped_by_signals

    folder = model / EXPORTS / to
    if any(folder.glob("*.gguf")):
        observe(Note(message=f"It is exported already: {folder}"))
        return
    observe(Note(message="Exporting it as GGUF, compared with what was trained"))
    try:
        with stopped_by_signals():
            written = export_served(weights_in(model, trust_remote_code=trust_remote_code), to, folder)
    except UserError as error:
        again = f"autosft export {model} --format {to}"
        raise StudyFailedError(
            f"the model is trained, but could not be exported: {error}\nAgain with: {again}"
        ) from error
    for note in (*written.notes, f"Exported: {written.folder}", f"Next: {written.command}"):
        observe(Note(message=note))


def overrides_of(
    *,
    model: str | None,
    data: str | None,
    eval_data: str | None,
    prompts: str | None,
    precision: PrecisionName | None,
    memory: str,
    effective_batch_size: int | None,
    scale_lr: ScalingName,
    trust_remote_code: bool,
) -> Overrides:
    from autosft.profiles.memory_ways import AUTO, WAYS, require_way
    from autosft.profiles.recipe import Precision
    from autosft.scheduler.train.overrides import LearningRateScaling, Overrides

    require_way(memory, AUTO, precision or "auto", has_optimizer=False)
    way = WAYS[memory]
    return Overrides(
        model=model,
        data=data,
        eval_data=eval_data,
        prompts=prompts,
        precision=way.precision if precision is None else Precision(precision),
        optimizer=way.optimizer,
        effective_batch_size=effective_batch_size,
        scale_lr=LearningRateScaling(scale_lr),
        trust_remote_code=trust_remote_code,
    )


def refuse_url(output: Path | None) -> None:
    """Raise UserError if --output is a URL (whose double slash pathlib has collapsed)."""
    from autosft.profiles.errors import UserError

    if output is not None and re.match(r"[a-z][a-z0-9+.-]+:/", str(output)):
        raise UserError(
            f"--output {output}: a single training run writes to a local folder.",
            remedy="Give a folder and copy it afterwards; autosft tune --output accepts URLs.",
        )
