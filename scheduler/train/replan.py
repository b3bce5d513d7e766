"""Plans a configuration for devices other than those it was found on: what changes, and what would fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.hardware.known_devices import known_devices
from autosft.profiles.model.quantization import require_method
from autosft.profiles.optimizers import require_optimizer
from autosft.profiles.recipe import Precision, why_not_trained
from autosft.profiles.units import gib
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.measured_memory import MeasuredMemory
from autosft.scheduler.decide.numerics import lacking, pinned_on
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.decide.self_measuring import Measuring, plan_or_measure
from autosft.studies.export import ExportedConfig
from autosft.studies.trial import ExecutionPlan, PinnedSettings

#: Number of devices that would fit to name.
NUM_PROPOSED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned:
    """A configuration's plan for this machine, and its differences from the study's."""

    devices: tuple[DeviceProfile, ...]  # identical; one unless several were requested or are needed
    pinned: PinnedSettings
    plan: ExecutionPlan
    changes: tuple[str, ...]  # those of memory and speed only, as `micro batch 1 -> 4`
    numerics: tuple[str, ...]  # differences in rounding, as requested or because of the device


def replan(
    config: ExportedConfig,
    devices: Sequence[DeviceProfile],
    models: Models,
    *,
    precision: Precision | None,
    together: bool = False,
    measured: MeasuredMemory | None = None,
    eval_micro_batch: int | None = None,
) -> Replanned:
    """Plan a configuration for the first of `devices` that it fits, else for as few as possible of a kind.

    `together`: for as many as are identical and divide the effective batch, because they were requested.
    What decides the result is kept: settings, examples, effective batch, and precision unless another one is
    requested.  If nothing bounds its memory, the run measures itself.  `measured`: memory of earlier attempts
    (default: as `models` have learned); `eval_micro_batch`: the evaluation batch, if a larger one has run out
    of memory.  Raises UserError for a precision that no device supports, and DoesNotFitError with what would
    fit.
    """
    model = models.model
    require_method(model.source, model.quantization, config.settings.method)
    able = able_devices(config, devices, precision)
    costs = models.costs if measured is None else replace(models.costs, measured=measured)
    batch = eval_micro_batch or config.pinned.eval_micro_batch
    refused: DoesNotFitError | None = None
    gangs = gangs_to_try(able, config.settings.effective_batch_size, together=together)
    for measuring, gang in itertools.product((Measuring.LIKELY, Measuring.ANYWAY), gangs):
        device = min(gang, key=usable_bytes)
        pinned, numerics = pinned_on(config.pinned, device, precision)
        pinned = replace(pinned, eval_micro_batch=batch)
        require_optimizer(
            config.settings.optimizer,
            method=config.settings.method,
            on_gpu=device.kind.traits.has_own_memory,
            precision=pinned.precision,
        )
        room = planner.Room(
            device=device,
            budget_bytes=usable_bytes(device),
            num_threads=threads_on(device, config),
            num_devices=len(gang),
        )
        try:
            plan = plan_or_measure(config.settings, pinned, room, costs, measuring)
        except DoesNotFitError as error:
            refused = error if len(gang) == 1 else refused or error
            continue
        plan = plan if eval_micro_batch is None else replace(plan, eval_micro_batch=eval_micro_batch)
        changes = () if config.plan is None else plan_changes(config.plan, plan)
        return Replanned(devices=gang, pinned=pinned, plan=plan, changes=changes, numerics=numerics)
    assert refused is not None
    raise refused_with_devices(refused)


def able_devices(
    config: ExportedConfig, devices: Sequence[DeviceProfile], precision: Precision | None
) -> list[DeviceProfile]:
    """Return the devices that support the configuration's precision, or the requested one.

    Raises UserError if there is none, and for a precision that its method cannot be trained in.
    """
    if reason := why_not_trained(config.settings.method, precision or config.pinned.precision):
        raise UserError(f"{reason}.", remedy="--precision fp16-autocast keeps them in fp32.")
    able = [device for device in devices if lacking(config.pinned, device, precision) is None]
    if able:
        return able
    first = devices[0]
    missing = lacking(config.pinned, first, precision)
    raise UserError(
        f"this configuration computes in {missing}, which autosft does not support on {first.name}.",
        remedy="--precision fp32 trains the same examples and settings with other rounding, in more memory.",
    )


def refused_with_devices(refused: DoesNotFitError) -> DoesNotFitError:
    """Return the same error, with devices that would fit as its remedy."""
    return DoesNotFitError(
        refused.message,
        remedy=would_fit(refused),
        smallest=refused.smallest,
        settings=refused.settings,
        device=refused.device,
    )


def gangs_to_try(
    devices: Sequence[DeviceProfile], effective_batch_size: int, *, together: bool
) -> list[tuple[DeviceProfile, ...]]:
    """Return the devices to try training on, the first choice first."""
    gangs: list[tuple[DeviceProfile, ...]] = []
    for name in dict.fromkeys(device.name for device in devices if not device.is_mig):
        alike = tuple(device for device in devices if device.name == name)
        gangs += [alike[:size] for size in planner.gang_sizes(effective_batch_size, len(alike))]
    gangs.sort(key=len, reverse=together)
    alone = [(device,) for device in devices]
    return [*gangs, *alone] if together else [*alone, *gangs]


def threads_on(device: DeviceProfile, config: ExportedConfig) -> int:
    """Return the number of CPU threads: the study's if there are enough cores; else all cores of a CPU."""
    if config.plan is not None and config.plan.device_name == device.name:
        return min(config.plan.num_threads, device.num_cores or config.plan.num_threads)
    return max(1, device.num_cores) if device.kind.traits.is_split_by_cores else 1


def plan_changes(before: ExecutionPlan, after: ExecutionPlan) -> tuple[str, ...]:
    """Return the differences between two plans, as `micro batch 1 -> 4`."""
    names = {
        "micro_batch": "micro batch",
        "gradient_accumulation": "accumulation",
        "data_parallel": "devices",
        "checkpointing": "checkpointing",
        "sharding": "sharding",
        "num_threads": "threads",
        "eval_micro_batch": "evaluation batch",
    }
    pairs = [(label, getattr(before, name), getattr(after, name)) for name, label in names.items()]
    return tuple(
        f"{label} {getattr(old, 'value', old or 'as pinned')} -> {getattr(new, 'value', new)}"
        for label, old, new in pairs
        if old != new and new is not None
    )


def would_fit(refused: DoesNotFitError) -> str:
    """Name the smallest devices with enough memory, and the way to a smaller configuration."""
    need_bytes = refused.smallest.total_bytes
    known = sorted((device.usable_bytes, device.name) for device in known_devices())
    enough = [name for num_bytes, name in known if num_bytes >= need_bytes]
    devices = f"Would fit: a device with {gib(need_bytes)} free"
    if enough:
        devices += ", such as " + ", ".join(enough[:NUM_PROPOSED])
    return (
        f"{devices}.\n"
        "Or search again for this machine: autosft tune with --method lora or a shorter --seq-len."
    )
