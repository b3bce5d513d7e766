"""The plan of a study in words: what fits and why, what is searched, how long it takes."""

from __future__ import annotations

from collections.abc import Sequence

from autosft.profiles.dataset.prepared import PreparedData, describe
from autosft.profiles.hardware import DeviceKind
from autosft.profiles.model import ModelProfile
from autosft.profiles.recipe import Method
from autosft.profiles.units import gib
from autosft.scheduler.budget import Budget
from autosft.scheduler.tuning import Slots
from autosft.studies.request import TuneRequest
from autosft.studies.space import Choices, SearchSpace
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings


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
    method: Method,
) -> tuple[str, ...]:
    """Return the plan as the user reads it: one line each for model, data, device, memory, search, time."""
    need = plan.estimate.need
    lengths = space.seq_len.values if isinstance(space.seq_len, Choices) else (settings.seq_len,)
    about_data = describe(data, sorted(int(one) for one in lengths))
    searched = ", ".join(f"{name} {dimension}" for name, dimension in space.searched().items())
    chosen = " (chosen: it fits)" if request.method == "auto" and method is Method.FULL else ""
    if request.method == "auto" and method is Method.LORA:
        chosen = " (chosen: full fine-tuning does not fit)"
    lines = [
        f"Model: {model.source}, {model.num_parameters:,} parameters, {model.architecture}.",
        f"Data: {about_data[0]}",
        *(f"      {line}" for line in about_data[1:]),
        *(device_line(one) for one in slots),
        f"Method: {method.value}{chosen}, {pinned.precision.value}, length {settings.seq_len}, "
        f"{settings.num_train_examples:,} examples in a full run ({request.epochs:g} epochs).",
        f"Memory: needs {gib(need.median_bytes)} (at most {gib(plan.estimate.total_bytes)}) a trial, "
        f"predicted by {plan.estimate.method}; largest at the {plan.estimate.peak_phase}: "
        f"{plan.estimate.peak_owner}.",
        f"Plan: micro batch {plan.micro_batch} x {plan.gradient_accumulation} accumulated = effective batch "
        f"{settings.effective_batch_size}; {plan.reason}",
        f"Search: {searched}.",
        *budget.lines,
    ]
    return tuple(lines)


def device_line(slots: Slots) -> str:
    device = slots.device
    at_once = "one trial at a time" if slots.num_slots == 1 else f"{slots.num_slots} trials at once"
    if device.kind is DeviceKind.CPU:
        at_once += f" with {slots.num_threads} thread{'s' if slots.num_threads > 1 else ''} each"
    return f"Device: {device.name}, {gib(device.free_bytes)} free of {gib(device.total_bytes)}, {at_once}."
