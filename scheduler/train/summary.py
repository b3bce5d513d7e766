"""What `autosft train` says before it starts: the plan, and what it changes against the study's."""

from __future__ import annotations

from collections.abc import Sequence

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.units import duration, gib
from autosft.scheduler.decide.self_measuring import memory_in_words
from autosft.scheduler.events import Observer, StudyOpened
from autosft.scheduler.setup.prompt_set import PromptSet
from autosft.scheduler.train.replan import Replanned
from autosft.studies.export import ExportedConfig
from autosft.studies.trial import ExecutionPlan, TrainingSettings


def tell_plan(
    observe: Observer,
    config: ExportedConfig,
    replanned: Replanned,
    *,
    resume_from: str | None,
    before: TrainingSettings,
    prompts: Sequence[str] = (),
    left_out: Sequence[DeviceProfile] = (),
) -> None:
    """Say what is trained and what this machine's plan changed against the study's."""
    settings, plan, number = config.settings, replanned.plan, len(replanned.devices)
    free = gib(min(one.free_bytes for one in replanned.devices))
    name = replanned.devices[0].name
    on = f"Devices: {number} x {name}, {free} free on each" if number > 1 else f"Device: {name}, {free} free"
    spread = f" x {number} devices ({plan.sharding.value.upper()})" if number > 1 else ""
    row = " in one row, without padding," if config.pinned.padding_free else ""
    lines = [
        f"Model: {config.model.name}. Data: {config.data.source}.",
        f"From study {config.study}, trial {config.trial}: learning rate {settings.learning_rate:g}, "
        f"effective batch {settings.effective_batch_size}, length {settings.seq_len}, "
        f"{settings.num_train_examples:,} examples.",
        f"{on}.",
        f"Plan: micro batch {plan.micro_batch}{row} x {plan.gradient_accumulation} accumulated{spread} = "
        f"effective batch {settings.effective_batch_size}; {plan.reason}",
        f"Memory: {memory_in_words(plan)}.",
        f"Time: about {duration(plan.predicted_duration_s)}, predicted.",
    ]
    if left_out:
        names = ", ".join(f"{one.name} ({one.uuid})" for one in left_out)
        lines.append(
            f"Not used: {names}. Devices train together that are alike and as many as divide the effective "
            "batch."
        )
    if settings != before:
        lines.append(
            f"Changed by you, and with it the result: effective batch {before.effective_batch_size} -> "
            f"{settings.effective_batch_size}, learning rate {before.learning_rate:g} -> "
            f"{settings.learning_rate:g} (--scale-lr linear or sqrt makes it follow, none keeps it)."
        )
    if replanned.changes:
        words = ", ".join(replanned.changes)
        lines.append(f"Changed for this machine, with the same examples in every step: {words}.")
    lines += prompts
    lines += [f"Rounds otherwise than the study: {one}." for one in replanned.numerics]
    if resume_from is not None:
        lines.append(f"Goes on from {resume_from}.")
    observe(
        StudyOpened(
            study=config.study,
            plan_lines=tuple(lines),
            num_trials=1,
            num_finished=0,
            metric=config.expected.metric,
            minimize=config.expected.minimize,
            deadline=None,
        )
    )


def prompt_lines(config: ExportedConfig, prompts: PromptSet | None, plan: ExecutionPlan) -> tuple[str, ...]:
    """Say whether the prompts that the configuration was chosen by are asked again."""
    if prompts is not None:
        return prompts.lines(plan)
    if config.expected.metric != "ifeval":
        return ()
    return ("IFEval: no prompts are asked; score what is trained with: autosft evaluate --metric ifeval",)


def left_out_of(devices: Sequence[DeviceProfile], replanned: Replanned) -> tuple[DeviceProfile, ...]:
    """Return the devices that were named and that the plan does without."""
    return tuple(one for one in devices if one not in replanned.devices)
