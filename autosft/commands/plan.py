"""`autosft plan`: what fits on a device, how fast it would run, and which changes would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from autosft.commands import remote
from autosft.commands.options import (
    AsJson,
    BlockSize,
    Command,
    Hardware,
    MaxRounds,
    Quiet,
    SkipBadRecords,
    Storage,
    TemplateDate,
    TrustRemoteCode,
    application,
    teach,
    write_json,
)
from autosft.commands.remote import with_server
from autosft.profiles import own_folders
from autosft.scheduler.plan.task import Task, read_task
from autosft.ui.terminal import new_console, status_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from autosft.profiles.hardware.device import DeviceProfile
    from autosft.scheduler.plan.method_plan import DeviceAnswer, MethodPlan
    from autosft.studies.trial import TrainingSettings
    from autosft.ui.plan_view import DevicesAtHand

app = application()

#: What `--optimizer` takes beside names, to list them.
LISTS = ("help", "?")


def list_optimizers(given: str | None) -> str | None:
    """List the optimizers where that is asked for, whatever else is missing; else return what is given."""
    if given not in LISTS:
        return given
    from autosft.ui.optimizers_view import optimizers_table
    from autosft.ui.tables import show_table

    show_table(optimizers_table())
    raise typer.Exit


METHODS = ("full", "lora", "qlora")
PrecisionName = Literal["auto", "fp32", "bf16-autocast", "fp16-autocast", "bf16", "bf16-stochastic", "fp16"]
MemoryName = Literal["exact", "lean", "leanest", "auto"]


@app.command(
    "plan",
    cls=Command,
    help=teach(
        "Show what fits: memory, speed and time of each method, without training or weights.",
        "autosft plan --model Llama-2-7b --hardware A100-40GB",
        "autosft plan --model ./llama --data chats.jsonl        your data, this machine",
        "autosft plan --model Qwen2.5-7B --what-gpu             which GPUs are large enough",
    ),
    epilog="Memory is predicted by tracing the training step: no weights are loaded and no GPU is used.",
)
@with_server(remote.plan)
def plan(
    *,
    model: Annotated[
        str,
        typer.Option(
            metavar="PATH_OR_HUB_ID", help="Model folder, hub id or known name.", show_default=False
        ),
    ],
    data: Annotated[
        str | None, typer.Option(metavar="PATH_OR_HUB_ID", help="Training data, for its lengths.")
    ] = None,
    hardware: Hardware = "auto",
    method: Annotated[
        str, typer.Option(metavar="|".join(("auto", *METHODS, "sparse")), help="auto: all except sparse.")
    ] = "auto",
    adapter: Annotated[
        str,
        typer.Option(metavar="KIND", help="What --method lora trains: lora, dora, ia3, ..."),
    ] = "lora",
    padding_free: Annotated[
        bool,
        typer.Option("--padding-free", help="One row per micro batch, without padding."),
    ] = False,
    seq_len: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Truncate longer examples to N tokens."),
    ] = None,
    effective_batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=65_536, help="Examples per optimizer step.")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|help",
            help="Optimizer, by its transformers name; help lists them.",
            callback=list_optimizers,
            is_eager=True,
        ),
    ] = None,
    precision: Annotated[
        PrecisionName, typer.Option(metavar="|".join(get_args(PrecisionName)), help="Precision of training.")
    ] = "auto",
    memory: Annotated[
        MemoryName,
        typer.Option(
            metavar="|".join(get_args(MemoryName)),
            help="How full fine-tuning holds weights and moments; auto compares the ways.",
        ),
    ] = "exact",
    lora_rank: Annotated[int | None, typer.Option(metavar="N", min=1, help="Rank of LoRA adapters.")] = None,
    lora_targets: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Modules to adapt: all-linear, or names.")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="Plan for N of the GPU.")] = None,
    epochs: Annotated[float, typer.Option(metavar="X", help="Passes over the training data.")] = 3.0,
    max_rounds: MaxRounds = None,
    block_size: BlockSize = None,
    template_date: TemplateDate = None,
    skip_bad_records: SkipBadRecords = False,
    what_gpu: Annotated[
        bool, typer.Option("--what-gpu", help="List the known devices that can run this, smallest first.")
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither read nor write cached traces and data.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    storage: Storage = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what fits: memory, speed and time of each method, without training or weights."""
    from autosft.profiles.memory_ways import require_way
    from autosft.scheduler.plan.asked import Asked, lora_settings
    from autosft.scheduler.plan.method_plan import what_gpu as what_gpu_can
    from autosft.scheduler.plan.methods import methods_to_plan, without_padding
    from autosft.scheduler.setup.learned import learned_so_far
    from autosft.studies.store.database import default_storage_url
    from autosft.ui.plan_view import DevicesAtHand

    check_flags(method, adapter=adapter, optimizer=optimizer, epochs=epochs)
    require_way(memory, method, precision, has_optimizer=optimizer is not None)
    asked = Asked(precision=precision, memory=memory)
    with ExitStack() as stack:
        status = stack.enter_context(status_line(is_quiet=quiet or as_json))
        cache = cache_folder(stack, no_cache=no_cache)
        device, at_hand, notes = (None, 0, ()) if what_gpu else planned_for(hardware, num_gpus)
        status.update(f"Reading {model}" + (f" and {data}" if data else ""))
        task = read_task(
            model,
            data,
            seq_len,
            epochs,
            cache / "data",
            max_rounds=max_rounds,
            block_size=block_size,
            template_date=template_date,
            skip_bad_records=skip_bad_records,
            trust_remote_code=trust_remote_code,
        )
        fixed = lora_settings(task, method, adapter, lora_rank=lora_rank, lora_targets=lora_targets)
        task = replace(task, optimizer=optimizer, fixed=fixed)
        if padding_free:
            task = without_padding(task, adapter)
        methods = asked.trainable(methods_to_plan(task, method, adapter), is_comparison=method == "auto")
        if device is not None:
            asked.check(methods, device, optimizer)
        requests = [task.settings(each, effective_batch_size, adapter) for each in methods]
        forecast = task.forecast(
            learned_so_far(storage or default_storage_url()), None if no_cache else cache / "memory"
        )
        status.update(f"Tracing a training step of {model} (once; later plans are faster)")
        if device is None:
            answers = [
                answer for settings in requests for answer in what_gpu_can(*asked.only(settings, forecast))
            ]
            status.stop()
            show_devices(task, requests[0], answers, as_json=as_json, is_quiet=quiet)
        else:
            plans = (one for settings in requests for one in asked.plans(settings, device, forecast, at_hand))
            show_methods(
                task,
                requests[0],
                plans,
                DevicesAtHand(device=device, number=at_hand, notes=notes),
                partial(hidden, status),
                as_json=as_json,
                is_quiet=quiet,
            )


# What is asked for


def check_flags(method: str, *, adapter: str, optimizer: str | None, epochs: float) -> None:
    """Raise UserError for flags that are wrong whatever the model."""
    from autosft.profiles.errors import UserError
    from autosft.profiles.optimizers import find_optimizer
    from autosft.scheduler.plan.methods import methods_with

    if method not in ("auto", *METHODS, "sparse"):
        raise UserError(
            f"--method {method}: not a method.", remedy=f"Use auto, {', '.join(METHODS)} or sparse."
        )
    if method == "qlora" and method not in methods_with(adapter):
        raise UserError(
            f"--adapter {adapter}: QLoRA is predicted only for LoRA and its variants.",
            remedy="Use --method lora.",
        )
    if optimizer is not None:
        find_optimizer(optimizer)
    if not epochs > 0:
        raise UserError(f"--epochs {epochs:g}: must be above 0.", remedy="Use 3, for example.")


# Inputs


def planned_for(hardware: str, num_gpus: int | None = None) -> tuple[DeviceProfile, int, tuple[str, ...]]:
    """Return the device to plan for, the number of its kind, and remarks on where it comes from.

    Of different devices that is the one with the least usable memory.  `num_gpus`: how many to plan for; of
    cards that are only named there are as many as wanted.  Raises UserError for more than there are.
    """
    from autosft.profiles.errors import UserError
    from autosft.profiles.hardware.benchmark import with_measured_rates
    from autosft.profiles.hardware.busy import busy_notes, load_now
    from autosft.profiles.hardware.device import usable_bytes
    from autosft.profiles.hardware.discover import profile_hardware

    cluster = with_measured_rates(profile_hardware(hardware))
    weakest = min(cluster.devices, key=lambda device: (usable_bytes(device), device.uuid))
    number = sum(device.name == weakest.name for device in cluster.devices)
    if num_gpus is not None:
        is_any_number = weakest.is_assumed and weakest.kind.traits.forms_gangs
        if num_gpus > number and not is_any_number:
            raise UserError(
                f"--num-gpus {num_gpus}: there are {number} {weakest.name}.",
                remedy="Give fewer, or plan for a known card: --hardware A100-80GB.",
            )
        number = num_gpus
    return weakest, number, (*cluster.notes, *busy_notes(cluster.devices, load_now()))


def cache_folder(stack: ExitStack, *, no_cache: bool) -> Path:
    """Return the cache folder for traces and tokenized data, or a temporary one."""
    import tempfile

    if no_cache:
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autosft-")))
    return own_folders.cache_folder()


@contextmanager
def hidden(status: Status) -> Iterator[None]:
    """Take the status line off the terminal while something else is printed there."""
    status.stop()
    yield
    status.start()


# Output


def show_methods(
    task: Task,
    settings: TrainingSettings,
    plans: Iterable[MethodPlan],
    devices: DevicesAtHand,
    without_status: Callable[[], AbstractContextManager[None]],
    *,
    as_json: bool,
    is_quiet: bool,
) -> None:
    """Print the plans of all methods; in text, each as soon as it is made."""
    from autosft.scheduler.plan.methods import plan_as_plain, task_as_plain
    from autosft.studies.wire import to_plain
    from autosft.ui import plan_view

    if as_json:
        write_json(
            {
                **task_as_plain(task),
                "device": to_plain(devices.device),
                "num_devices": devices.number,
                "methods": [plan_as_plain(method_plan) for method_plan in plans],
            }
        )
        return
    console = plan_console()
    if is_quiet:
        console.print(plan_view.comparison(list(plans)))
        return
    lines = plan_view.task_lines(task, settings)
    timed = "training alone" if task.data is None else "training and evaluations"
    for part in plan_view.whole_plan(lines, plans, devices, console.width, what_is_timed=timed):
        with without_status():
            console.print(part)


def show_devices(
    task: Task, settings: TrainingSettings, answers: list[DeviceAnswer], *, as_json: bool, is_quiet: bool
) -> None:
    from autosft.scheduler.plan.methods import task_as_plain
    from autosft.studies.wire import to_plain
    from autosft.ui import plan_view

    if as_json:
        write_json({**task_as_plain(task), "devices": to_plain(answers)})
        return
    console = plan_console()
    if not is_quiet:
        for line in plan_view.task_lines(task, settings):
            console.print(line)
    console.print(plan_view.devices_table(answers))


def plan_console() -> Console:
    """Return a console as wide as the terminal; files and pipes are not wrapped."""
    import sys

    return new_console(width=None if sys.stdout.isatty() else 140)
