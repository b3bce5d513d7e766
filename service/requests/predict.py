"""What an item needs, predicted as its command would plan it, for each kind and number of devices.

Runs in the planner's process (`planner_process`), since it imports what plans: torch, transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile, usable_bytes
from autosft.profiles.hardware.discover import save_profile
from autosft.profiles.memory_ways import AUTO, WAYS, require_way
from autosft.profiles.recipe import Precision
from autosft.scheduler.decide.planner import DoesNotFitError, recipe_for
from autosft.scheduler.events import StudyEvent
from autosft.scheduler.setup.inputs import devices_named
from autosft.scheduler.setup.learned import learned_so_far
from autosft.scheduler.setup.open_study import PlannedStudy, plan_study
from autosft.scheduler.setup.prompt_set import read_prompt_set
from autosft.scheduler.train.overrides import LearningRateScaling, Overrides
from autosft.scheduler.train.training_run import Devices, plan_file
from autosft.service.devices import device_kind
from autosft.service.values import Arguments, Demand, Way, is_elsewhere
from autosft.studies.request import TuneRequest, read_request, split_searched
from autosft.studies.trial import ExecutionPlan

#: What an evaluation is assumed to take, in seconds: nothing predicts it.
EVALUATION_S, EVALUATION_LOW_S, EVALUATION_HIGH_S = 600.0, 60.0, 3600.0
#: By how much a predicted time may be off where no better bound is known.
UNSURE = 1.5
#: What a driver is assumed to take beside its trials, in seconds: imports, Ray, the last scores.
START_S = 30.0
NOWHERE = "It fits on no device of this server."
#: Numbers of devices that are planned for, below all that there are.
WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What an item needs, or why it cannot run here."""

    demand: Demand | None
    refusal: str = ""  # what is wrong or does not fit, with what would
    lines: tuple[str, ...] = ()  # the plan in words


def predict(arguments: Arguments, hardware: str, storage: str) -> Prediction:
    """Plan an item on the devices of a saved profile, which are taken as idle."""
    try:
        cluster = devices_named(hardware)
        match arguments.command:
            case "tune":
                return _of_tune(arguments, cluster, storage)
            case "train":
                return _of_train(arguments, here_of(cluster), storage)
            case _:
                return _of_evaluation(here_of(cluster))
    except UserError as error:
        return Prediction(demand=None, refusal=str(error))


def kinds_of(cluster: ClusterProfile) -> Iterator[tuple[str, tuple[DeviceProfile, ...]]]:
    """Yield the devices of each kind, those with the least memory first."""
    for name, alike in groupby(sorted(cluster.devices, key=device_kind), key=device_kind):
        yield name, tuple(sorted(alike, key=lambda device: (usable_bytes(device), device.uuid)))


def here_of(cluster: ClusterProfile) -> ClusterProfile:
    """Return the devices of the server's machine, on which everything but a study runs.  Raises UserError."""
    here = tuple(device for device in cluster.devices if not is_elsewhere(device.node))
    if not here:
        raise UserError(
            "Only studies (tune) run on the other nodes of the cluster, and this server's own machine hands "
            "out no device.",
            remedy="Have its admin start the server on a node with GPUs, or with --hardware cpu.",
        )
    return replace(cluster, devices=here)


def widths(num: int) -> tuple[int, ...]:
    """Return the numbers of devices to plan for."""
    return tuple(sorted({width for width in WIDTHS if width < num} | {num}))


# tune


def tune_request(arguments: Arguments) -> TuneRequest:
    """Return the request of a `tune` command line."""
    fields: dict[str, Any] = {}
    for flag, value in arguments.flags:
        name = flag.removeprefix("--").replace("-", "_")
        if value:
            fields[name] = value
        else:
            fields[name.removeprefix("no_")] = not name.startswith("no_")
    fields.pop("take_offer", None)
    return read_request(split_searched(fields), None)


def _of_tune(arguments: Arguments, cluster: ClusterProfile, storage: str) -> Prediction:
    request = tune_request(arguments).model_copy(update={"storage": storage})
    learned, prompts = learned_so_far(storage), read_prompt_set(request)
    ways: list[Way] = []
    refusals: list[str] = []
    lines: tuple[str, ...] = ()
    for kind, devices in kinds_of(cluster):
        num_slots = 0
        for width in widths(min(len(devices), request.num_gpus or len(devices))):
            part = replace(cluster, devices=devices[:width])
            asked = request.model_copy(update={"num_gpus": None})
            try:
                planned = plan_study(asked, part, False, learned, prompts, observe=_unheard)
                planned.design.budget.require_time()
            except DoesNotFitError as error:
                refusals.append(str(error))
                continue
            if planned.design.budget.num_slots <= num_slots:
                continue  # it cannot use that many
            num_slots = planned.design.budget.num_slots
            ways.append(_way_of_study(planned, kind, width))
            lines = lines or planned.summary
    if not ways:
        return Prediction(demand=None, refusal=refusals[0] if refusals else NOWHERE)
    return Prediction(demand=Demand(ways=tuple(ways)), lines=lines)


def _way_of_study(planned: PlannedStudy, kind: str, width: int) -> Way:
    """Return what a study takes of `width` devices: as many trials at once as it plans to run there."""
    design = planned.design
    basis, budget, device = design.basis, design.budget, design.weakest
    per_device = max(1, -(-budget.num_slots * design.participants.devices_per_trial // width))
    recipe = replace(
        recipe_for(basis.settings, basis.pinned, basis.plan.checkpointing, basis.plan.gradient_accumulation),
        sharding=basis.plan.sharding,
        data_parallel=basis.plan.data_parallel,
    )
    threads = design.slots[0].num_threads
    step = planned.facts.models.step(recipe, basis.plan.micro_batch, basis.settings.seq_len, device, threads)
    unsure = step.upper_step_s / step.step_s
    return _way(basis.plan, kind, width, device, at_once=per_device, seconds=budget.study_s, unsure=unsure)


def _way(
    plan: ExecutionPlan,
    kind: str,
    width: int,
    device: DeviceProfile,
    *,
    at_once: int,
    seconds: float,
    unsure: float,
) -> Way:
    seconds += START_S
    alone = plan.measures_itself  # with all that is free
    load = at_once * plan.num_threads / max(1, device.num_cores)
    if not device.kind.traits.is_split_by_cores:
        load = at_once * plan.device_share
    return Way(
        kind=kind,
        width=width,
        bytes_each=usable_bytes(device) if alone else min(usable_bytes(device), at_once * plan.booked_bytes),
        seconds=seconds,
        seconds_low=seconds / unsure,
        seconds_high=seconds * unsure,
        load=min(1.0, load),
        may_share=not alone and width == 1,  # a gang has its devices to itself
    )


# train, evaluate


def _of_train(arguments: Arguments, cluster: ClusterProfile, storage: str) -> Prediction:
    given = dict(arguments.flags)
    overrides, wanted = overrides_in(given), int(given.get("--num-gpus") or 0)
    ways: list[Way] = []
    refusals: list[str] = []
    with TemporaryDirectory(prefix="autosft-") as folder:
        for kind, devices in kinds_of(cluster):
            file = Path(folder) / "devices.json"
            save_profile(replace(cluster, devices=devices), file)
            for width in (wanted,) if wanted else (None,):
                try:
                    found = plan_file(
                        Path(arguments.positional[0]),
                        devices=Devices(hardware=str(file), num_gpus=width),
                        overrides=overrides,
                        observe=_unheard,
                        storage=storage,
                        export=given.get("--export"),
                    )
                except DoesNotFitError as error:
                    refusals.append(str(error))
                    continue
                plan, device = found.plan, found.devices[0]
                seconds, num = plan.predicted_duration_s, len(found.devices)
                ways.append(_way(plan, kind, num, device, at_once=1, seconds=seconds, unsure=UNSURE))
    if not ways:
        return Prediction(demand=None, refusal=refusals[0] if refusals else NOWHERE)
    return Prediction(demand=Demand(ways=tuple(ways)))


def overrides_in(given: Mapping[str, str]) -> Overrides:
    """Return the overrides of a `train` command line."""
    memory, precision = given.get("--memory", "exact"), given.get("--precision")
    require_way(memory, AUTO, precision or "auto", has_optimizer=False)
    batch = given.get("--effective-batch-size")
    return Overrides(
        model=given.get("--model"),
        data=given.get("--data"),
        eval_data=given.get("--eval-data"),
        prompts=given.get("--ifeval-data"),
        precision=Precision(precision) if precision else WAYS[memory].precision,
        optimizer=WAYS[memory].optimizer,
        effective_batch_size=int(batch) if batch else None,
        scale_lr=LearningRateScaling(given.get("--scale-lr", "none")),
        trust_remote_code="--trust-remote-code" in given,
    )


def _of_evaluation(cluster: ClusterProfile) -> Prediction:
    """Assume a whole device: what an evaluation takes is not predicted."""
    ways = tuple(
        Way(
            kind=kind,
            width=1,
            bytes_each=usable_bytes(devices[0]),
            seconds=EVALUATION_S,
            seconds_low=EVALUATION_LOW_S,
            seconds_high=EVALUATION_HIGH_S,
        )
        for kind, devices in kinds_of(cluster)
    )
    return Prediction(demand=Demand(ways=ways, is_predicted=False))


def _unheard(event: StudyEvent) -> None:
    """Take no notice of an event: the prediction alone is asked for."""
