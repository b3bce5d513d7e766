"""The plan of a study for its user: what fits and why, what is searched, how long it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autosft.profiles.dataset.prepared import PreparedData
from autosft.profiles.dataset.prepared_summary import describe
from autosft.profiles.memory_ways import AUTO, EXACT, METHODS, loss_in_words
from autosft.profiles.model.adapters import describe_start
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.model.sparsity import read_sparsity
from autosft.profiles.recipe import Checkpointing, Method
from autosft.profiles.speed.step_work import num_trained
from autosft.profiles.units import gib
from autosft.profiles.user_code import load
from autosft.profiles.user_trainer import overrides
from autosft.scheduler.decide.cpu_precision import why_in_bf16
from autosft.scheduler.decide.measured_memory import MEASURED
from autosft.scheduler.decide.planner import recipe_for
from autosft.scheduler.decide.self_measuring import describe_memory
from autosft.scheduler.setup.design import Basis, Design
from autosft.scheduler.setup.device_selection import Participants
from autosft.scheduler.setup.facts import StudyFacts
from autosft.scheduler.setup.preset_summary import preset_summary
from autosft.scheduler.study_run import Slots
from autosft.studies.formatting import format_settings
from autosft.studies.request import TuneRequest
from autosft.studies.search.dimensions import Choices
from autosft.studies.search.presets import preset
from autosft.studies.search.settings import SETTINGS
from autosft.studies.search.space import SearchSpace
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings

#: Maximum number of bytes read from a model's weights to detect pruning.
SPARSITY_SAMPLE_BYTES = 64 << 20
#: Below so many records the held-out ones are too few to compare trials on once.
FEW_RECORDS = 200


def plan_summary(design: Design, facts: StudyFacts, request: TuneRequest) -> tuple[str, ...]:
    """Return the plan of a study as lines: model, data, devices, memory, search and time.

    Samples the model's weights to detect pruning, and imports a user's trainer.
    """
    basis, model = design.basis, facts.model
    space, settings, pinned = basis.space, basis.settings, basis.pinned
    searched = ", ".join(f"{name} {dimension}" for name, dimension in space.searched().items())
    lines = [
        f"Model: {model.source}, {model.num_parameters:,} parameters, {model.architecture}.",
        *data_lines(facts.data, space, settings, request.max_train_samples),
        *device_lines(design.slots, design.participants),
        *sparsity_lines(model, settings.method),
        method_line(basis, model, request),
        *filter(None, [describe_start(settings.adapter)]),
        *own_code_lines(pinned),
        *precision_lines(basis),
        *held_lines(basis, request),
        f"Memory: {memory_line(basis.plan)}",
        plan_line(basis),
        f"Starts from: {start_summary(space, settings)}.",
        f"Search: {searched}.",
        *design.budget.lines,
    ]
    if request.preset is not None:
        lines += preset_summary(preset(request.preset), design, facts.models.costs)
    if facts.prompts is not None:
        lines += facts.prompts.lines(basis.plan)
    return tuple(lines)


def data_lines(
    data: PreparedData, space: SearchSpace, settings: TrainingSettings, max_samples: int | None = None
) -> Iterator[str]:
    """Describe the data, what each searched truncation length cuts off, and how little of it there is."""
    seq_len = space["seq_len"]
    lengths = seq_len.values if isinstance(seq_len, Choices) else (settings.seq_len,)
    first, *others = describe(data, sorted(int(length) for length in lengths))
    yield f"Data: {first}"
    yield from (f"      {line}" for line in others)
    num_train, num_eval = data.train.num_examples, data.eval.num_examples
    if max_samples is not None and max_samples < num_train:
        yield f"      of them trained on: {max_samples:,} of the {num_train:,}, drawn by the seed"
    if num_train + num_eval + data.final.num_examples < FEW_RECORDS:
        yield (
            f"      few records: {num_eval} to compare trials on tell only large differences from chance. "
            "Cross-validate where that matters: a study for each of --fold 1/5 to 5/5, and all of them in "
            "autosft studies compare."
        )


def method_line(basis: Basis, model: ModelProfile, request: TuneRequest) -> str:
    """Describe what is trained, in which precision, on how many examples, and why with this method."""
    settings, pinned = basis.settings, basis.pinned
    reasons = {Method.FULL: " (chosen: it fits)", Method.LORA: " (chosen: full fine-tuning does not fit)"}
    chosen = reasons.get(settings.method, "") if request.method == "auto" else ""
    return (
        f"Method: {settings.method.value}{chosen}, trains {trained_share(model, settings, pinned)}, "
        f"{pinned.precision.value}, length {settings.seq_len}, "
        f"{settings.num_train_examples:,} examples in a full run ({request.epochs:g} epochs)."
    )


def precision_lines(basis: Basis) -> Iterator[str]:
    """Say why a CPU trains in bf16, and how not to."""
    if basis.speedup_in_bf16 is not None:
        yield f"Precision: {why_in_bf16(basis.speedup_in_bf16)}"


def held_lines(basis: Basis, request: TuneRequest) -> Iterator[str]:
    """Describe how what is trained is held, where that was left to this machine or is not exact."""
    way = basis.way
    if way is not EXACT:
        chosen = " (chosen: the first that fits)" if request.memory == AUTO else ""
        yield f"Held: --memory {way.name}{chosen}, {way.summary}; {loss_in_words(way)}."
    elif request.memory == AUTO and basis.settings.method in METHODS:
        yield "Held: --memory exact (chosen: it fits)."


def plan_line(basis: Basis) -> str:
    """Describe how the default configuration's effective batch is made up."""
    plan = basis.plan
    row = " in one row, without padding," if basis.pinned.padding_free else ""
    return (
        f"Plan: micro batch {plan.micro_batch}{row} x {plan.gradient_accumulation} accumulated"
        f"{gang_part(plan)} = effective batch {basis.settings.effective_batch_size}; {plan.reason}"
    )


def memory_line(plan: ExecutionPlan) -> str:
    """Describe what a trial needs and how that is known; for a traced step, also its peak."""
    summary = describe_memory(plan, per="trial")
    if plan.estimate.untraced or plan.estimate.method == MEASURED:
        return f"{summary}."
    return f"{summary}; largest at the {plan.estimate.peak_phase}: {plan.estimate.peak_owner}."


def start_summary(space: SearchSpace, settings: TrainingSettings) -> str:
    """Describe all settings of the default configuration, fixed and searched."""
    values = tuple(
        (name, dimension.start())
        for name, dimension in space.items
        if name != "method" and (settings.adapter is not None or not SETTINGS[name].of_adapters)
    )
    summary = format_settings([value for value in values if value != ("max_rounds", 0)], {})
    return f"{summary}, gradients clipped at {settings.max_grad_norm:g}, seed {settings.seed}"


def trained_share(model: ModelProfile, settings: TrainingSettings, pinned: PinnedSettings) -> str:
    """Describe how many of the model's parameters are trained."""
    num = num_trained(model, recipe_for(settings, pinned, Checkpointing.OFF, 1))
    if num == model.num_parameters:
        return f"all {num:,} parameters"
    return f"{num:,} of {model.num_parameters:,} parameters ({num / model.num_parameters:.2%})"


def own_code_lines(pinned: PinnedSettings) -> Iterator[str]:
    """Describe which parts of a user's trainer and loss are used, and which are never called."""
    if pinned.trainer is not None:
        found = overrides(load(pinned.trainer, flag="--trainer"), name=pinned.trainer.name)
        yield f"Trainer: {pinned.trainer.name}, {found.describe()}."
    if pinned.loss is not None:
        before = " (in place of the trainer's)" if pinned.trainer is not None else ""
        yield f"Loss: {pinned.loss.name}{before}, over full logits, traced and trained with."


def sparsity_lines(model: ModelProfile, method: Method) -> Iterator[str]:
    """Describe whether a pruned model's zeros are kept, from a sample of its weights; nothing if dense.

    Hub models that have not been downloaded are not checked.
    """
    if not Path(model.source).expanduser().is_dir():
        return
    sampled = read_sparsity(model.source, sample_bytes=SPARSITY_SAMPLE_BYTES)
    if not sampled.pruned:
        return
    fate = {
        Method.SPARSE: "they are kept",
        Method.FULL: "full fine-tuning fills them; --method sparse keeps them",
    }.get(method, "merging the adapter fills them, but with export --merge --keep-zeros")
    yield (
        f"Sparsity: {sampled.pruned_share:.4f} of the pruned matrices are zeros ({sampled.pattern}; "
        f"{len(sampled.matrices)} matrices sampled): {fate}."
    )


def gang_part(plan: ExecutionPlan) -> str:
    if plan.data_parallel == 1:
        return ""
    return f" x {plan.data_parallel} devices ({plan.sharding.value.upper()})"


def device_lines(slots: Sequence[Slots], participants: Participants[Any]) -> Iterator[str]:
    """Describe the devices in use, a line per group of identical ones, and those that are left out."""
    alike: dict[object, list[Slots]] = {}
    for shared in slots:
        alike.setdefault((shared.device.name, shared.num_slots, shared.num_threads), []).append(shared)
    for group in alike.values():
        yield device_line(group, participants.devices_per_trial)
    if participants.left_out:
        names = ", ".join(dict.fromkeys(device.name for device in participants.left_out))
        yield f"Left out: {names}, too small for the default configuration."


def device_line(group: Sequence[Slots], devices_per_trial: int) -> str:
    """Describe the free memory of identical devices (the minimum) and how many trials they run."""
    slots = min(group, key=lambda shared: shared.device.free_bytes)
    device, number = slots.device, slots.num_slots
    each = " each" if len(group) > 1 else ""
    at_once = f"one trial at a time{each}" if number == 1 else f"{number} trials at once{each}"
    if devices_per_trial > 1:
        at_once = f"{devices_per_trial} together for a trial"
    if device.kind.traits.is_split_by_cores:
        at_once += f" with {slots.num_threads} thread{'s' if slots.num_threads > 1 else ''} each"
    name = f"{len(group)} x {device.name}" if len(group) > 1 else device.name
    return f"Device: {name}, {gib(device.free_bytes)} free of {gib(device.total_bytes)}{each}, {at_once}."
