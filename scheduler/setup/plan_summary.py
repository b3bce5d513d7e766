"""The plan of a study in words: what fits and why, what is searched, how long it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.prepared import PreparedData, describe
from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.model.sparsity import read_sparsity
from autosft.profiles.recipe import Checkpointing, Method
from autosft.profiles.speed.step_work import num_trained
from autosft.profiles.units import gib
from autosft.profiles.user_code import load
from autosft.profiles.user_trainer import overrides
from autosft.scheduler.decide.budget import Budget
from autosft.scheduler.decide.measured_memory import MEASURED
from autosft.scheduler.decide.planner import recipe_for
from autosft.scheduler.decide.self_measuring import memory_in_words
from autosft.scheduler.loop.tuning import Slots
from autosft.scheduler.setup.device_selection import Participants
from autosft.studies.formatting import format_settings
from autosft.studies.request import TuneRequest
from autosft.studies.search.dimensions import Choices
from autosft.studies.search.settings import SETTINGS
from autosft.studies.search.space import SearchSpace
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings

#: Read of a model's weights to see whether it is pruned.
SPARSITY_SAMPLE_BYTES = 64 << 20


def in_words(
    request: TuneRequest,
    model: ModelProfile,
    data: PreparedData,
    space: SearchSpace,
    settings: TrainingSettings,
    pinned: PinnedSettings,
    plan: ExecutionPlan,
    slots: Sequence[Slots],
    budget: Budget,
    taking_part: Participants[Any],
) -> tuple[str, ...]:
    """Return the plan as the user reads it: one line each for model, data, device, memory, search, time."""
    method = taking_part.method
    row = " in one row, without padding," if pinned.padding_free else ""
    seq_len = space["seq_len"]
    lengths = seq_len.values if isinstance(seq_len, Choices) else (settings.seq_len,)
    about_data = describe(data, sorted(int(one) for one in lengths))
    searched = ", ".join(f"{name} {dimension}" for name, dimension in space.searched().items())
    chosen = " (chosen: it fits)" if request.method == "auto" and method is Method.FULL else ""
    if request.method == "auto" and method is Method.LORA:
        chosen = " (chosen: full fine-tuning does not fit)"
    lines = [
        f"Model: {model.source}, {model.num_parameters:,} parameters, {model.architecture}.",
        f"Data: {about_data[0]}",
        *(f"      {line}" for line in about_data[1:]),
        *device_lines(slots, taking_part),
        *sparsity_lines(model, method),
        f"Method: {method.value}{chosen}, trains {trained_in_words(model, settings, pinned)}, "
        f"{pinned.precision.value}, length {settings.seq_len}, "
        f"{settings.num_train_examples:,} examples in a full run ({request.epochs:g} epochs).",
        *own_code_lines(pinned),
        f"Memory: {memory_line(plan)}",
        f"Plan: micro batch {plan.micro_batch}{row} "
        f"x {plan.gradient_accumulation} accumulated{gang_words(plan)} "
        f"= effective batch {settings.effective_batch_size}; {plan.reason}",
        f"Starts from: {start_words(space, settings)}.",
        f"Search: {searched}.",
        *budget.lines,
    ]
    return tuple(lines)


def memory_line(plan: ExecutionPlan) -> str:
    """Say what a trial needs and how that is known; of a traced step also when, and what for."""
    words = memory_in_words(plan)
    if plan.estimate.untraced or plan.estimate.method == MEASURED:
        return f"{words}."
    return f"{words}, a trial; largest at the {plan.estimate.peak_phase}: {plan.estimate.peak_owner}."


def start_words(space: SearchSpace, settings: TrainingSettings) -> str:
    """Return every setting of the default configuration, fixed and searched ones alike."""
    values = tuple(
        (name, dimension.start())
        for name, dimension in space.items
        if name != "method" and (settings.lora is not None or not SETTINGS[name].of_adapters)
    )
    words = format_settings([one for one in values if one != ("max_rounds", 0)], {})
    return f"{words}, gradients clipped at {settings.max_grad_norm:g}, seed {settings.seed}"


def trained_in_words(model: ModelProfile, settings: TrainingSettings, pinned: PinnedSettings) -> str:
    """Say how many parameters are trained, of how many."""
    num = num_trained(model, recipe_for(settings, pinned, Checkpointing.OFF, 1))
    if num == model.num_parameters:
        return f"all {num:,} parameters"
    return f"{num:,} of {model.num_parameters:,} parameters ({num / model.num_parameters:.2%})"


def own_code_lines(pinned: PinnedSettings) -> Iterator[str]:
    """Say what of a user's trainer and loss is trained with, and what of it is never called."""
    if pinned.trainer is not None:
        found = overrides(load(pinned.trainer, flag="--trainer"), name=pinned.trainer.name)
        yield f"Trainer: {pinned.trainer.name}, {found.in_words()}."
    if pinned.loss is not None:
        before = " (in place of the trainer's)" if pinned.trainer is not None else ""
        yield f"Loss: {pinned.loss.name}{before}, over full logits, traced and trained with."


def sparsity_lines(model: ModelProfile, method: Method) -> Iterator[str]:
    """Say what becomes of a pruned model's zeros; nothing for a dense one.

    From a sample of its weights.  Models of the hub that are not here yet are not looked at.
    """
    if not Path(model.source).expanduser().is_dir():
        return
    sampled = read_sparsity(model.source, sample_bytes=SPARSITY_SAMPLE_BYTES)
    if not sampled.pruned:
        return
    what_happens = {
        Method.SPARSE: "they are kept",
        Method.FULL: "full fine-tuning fills them; --method sparse keeps them",
    }.get(method, "merging the adapter fills them, but with export --merge --keep-zeros")
    yield (
        f"Sparsity: {sampled.pruned_share:.4f} of the pruned matrices are zeros ({sampled.pattern}; "
        f"{len(sampled.matrices)} matrices sampled): {what_happens}."
    )


def gang_words(plan: ExecutionPlan) -> str:
    if plan.data_parallel == 1:
        return ""
    return f" x {plan.data_parallel} devices ({plan.sharding.value.upper()})"


def device_lines(slots: Sequence[Slots], taking_part: Participants[Any]) -> Iterator[str]:
    """Say what takes part and how it is shared, devices that are alike in one line; and what is left out."""
    alike: dict[object, list[Slots]] = {}
    for one in slots:
        alike.setdefault((one.device.name, one.num_slots, one.num_threads), []).append(one)
    for group in alike.values():
        yield device_line(group, taking_part.num_devices)
    if taking_part.left_out:
        names = ", ".join(dict.fromkeys(one.name for one in taking_part.left_out))
        yield f"Left out: {names}, too small for the default configuration."


def device_line(group: Sequence[Slots], devices_per_trial: int) -> str:
    """Say what devices of one sort have free (the least of them) and how many trials they take."""
    slots = min(group, key=lambda one: one.device.free_bytes)
    device, number = slots.device, slots.num_slots
    each = " each" if len(group) > 1 else ""
    at_once = f"one trial at a time{each}" if number == 1 else f"{number} trials at once{each}"
    if devices_per_trial > 1:
        at_once = f"{devices_per_trial} together for a trial"
    if device.kind is DeviceKind.CPU:
        at_once += f" with {slots.num_threads} thread{'s' if slots.num_threads > 1 else ''} each"
    name = f"{len(group)} x {device.name}" if len(group) > 1 else device.name
    return f"Device: {name}, {gib(device.free_bytes)} free of {gib(device.total_bytes)}{each}, {at_once}."
