"""What `autosft train` reports before it starts: the plan, and its differences from the study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.units import duration, gib
from autosft.scheduler.decide.self_measuring import describe_memory
from autosft.scheduler.events import StudyOpened
from autosft.scheduler.setup.prompt_set import PromptSet
from autosft.scheduler.train.replan import Replanned
from autosft.studies.export import ExportedConfig
from autosft.studies.metrics import Evidence, find_metric
from autosft.studies.trial import ExecutionPlan, TrainingSettings


def run_opened(
    config: ExportedConfig,
    replanned: Replanned,
    *,
    before: TrainingSettings,
    unused: Sequence[DeviceProfile] = (),
    prompts: Sequence[str] = (),
    resume_from: str | None = None,
) -> StudyOpened:
    """Return the event that tells observers about a run before it starts.

    `before` are the settings in the file, `unused` the requested devices that the plan does not use,
    `prompts` the lines about the metric's prompts.
    """
    lines = [
        *plan_lines(config, replanned),
        *change_lines(config, replanned, before=before, unused=unused),
        *prompts,
        *(f"Rounding differs from the study's: {change}." for change in replanned.numerics),
    ]
    if resume_from is not None:
        lines.append(f"Resumes from {resume_from}.")
    return StudyOpened(
        study=config.study,
        plan_lines=tuple(lines),
        num_trials=1,
        num_finished=0,
        metric=config.expected.metric,
        minimize=config.expected.minimize,
        deadline=None,
    )


def plan_lines(config: ExportedConfig, replanned: Replanned) -> Iterator[str]:
    """Describe what is trained, on which devices, how, and what that takes."""
    settings, plan, number = config.settings, replanned.plan, len(replanned.devices)
    free = gib(min(device.free_bytes for device in replanned.devices))
    name = replanned.devices[0].name
    spread = f" x {number} devices ({plan.sharding.value.upper()})" if number > 1 else ""
    row = " in one row, without padding," if config.pinned.padding_free else ""
    yield f"Model: {config.model.name}. Data: {config.data.source}."
    yield (
        f"From study {config.study}, trial {config.trial}: learning rate {settings.learning_rate:g}, "
        f"effective batch {settings.effective_batch_size}, length {settings.seq_len}, "
        f"{settings.num_train_examples:,} examples."
    )
    if number > 1:
        yield f"Devices: {number} x {name}, {free} free on each."
    else:
        yield f"Device: {name}, {free} free."
    yield (
        f"Plan: micro batch {plan.micro_batch}{row} x {plan.gradient_accumulation} accumulated{spread} = "
        f"effective batch {settings.effective_batch_size}; {plan.reason}"
    )
    yield f"Memory: {describe_memory(plan)}."
    yield f"Time: about {duration(plan.predicted_duration_s)}, predicted."


def change_lines(
    config: ExportedConfig,
    replanned: Replanned,
    *,
    before: TrainingSettings,
    unused: Sequence[DeviceProfile],
) -> Iterator[str]:
    """Describe the differences from the study: unused devices, the user's overrides, this machine's plan."""
    settings = config.settings
    if unused:
        names = ", ".join(f"{device.name} ({device.uuid})" for device in unused)
        yield (
            f"Not used: {names}. Devices that train together are identical, and their number divides the "
            "effective batch."
        )
    if settings.optimizer != before.optimizer:
        yield f"Changed by you, and with it the result: optimizer {before.optimizer} -> {settings.optimizer}."
    if settings != replace(before, optimizer=settings.optimizer):
        yield (
            f"Changed by you, and with it the result: effective batch {before.effective_batch_size} -> "
            f"{settings.effective_batch_size}, learning rate {before.learning_rate:g} -> "
            f"{settings.learning_rate:g} (--scale-lr linear or sqrt scales it with the batch, none keeps it)."
        )
    if replanned.changes:
        changes = ", ".join(replanned.changes)
        yield f"Changed for this machine, with the same examples in every step: {changes}."


def prompt_lines(config: ExportedConfig, prompts: PromptSet | None, plan: ExecutionPlan) -> tuple[str, ...]:
    """Describe whether the prompts that the configuration was chosen by are used again."""
    if prompts is not None:
        return prompts.lines(plan)
    metric = find_metric(config.expected.metric)
    if metric.evidence is not Evidence.PROMPTS:
        return ()
    return (f"No prompts are asked. To score the trained model: autosft evaluate --metric {metric.name}",)


def unused_devices(devices: Sequence[DeviceProfile], replanned: Replanned) -> tuple[DeviceProfile, ...]:
    """Return the requested devices that the plan does not use."""
    return tuple(device for device in devices if device not in replanned.devices)
