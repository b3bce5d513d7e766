"""Designs a study: what is pinned, what is searched, how many trials, on which slots.

Pure: no clock, no file, no device.  Its inputs are in `StudyFacts`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.memory.padding_free import require_padding_free
from autosft.profiles.memory.trainable import num_trained
from autosft.profiles.memory_ways import EXACT, MemoryWay
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.model.quantization import require_method
from autosft.profiles.optimizers import require_optimizer
from autosft.profiles.recipe import Method, RunTime, adapter_kind
from autosft.scheduler.decide import numerics, planner
from autosft.scheduler.decide.budget import Budget, plan_budget
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.cpu_precision import in_bf16, speedup_in_bf16
from autosft.scheduler.decide.measured_memory import MAX_EVAL_MICRO_BATCH
from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.decide.search_space import fixed_settings, lengths_of, study_space
from autosft.scheduler.decide.self_measuring import plan_or_measure
from autosft.scheduler.decide.sharing import assumed_overhead, slowdown
from autosft.scheduler.setup.device_selection import (
    DeviceChoice,
    Participants,
    choose_participants,
    sharing_policy,
)
from autosft.scheduler.setup.facts import StudyFacts
from autosft.scheduler.study_run import Slots
from autosft.studies.request import TuneRequest
from autosft.studies.search.dimensions import Choices, Dimension, Range, Value
from autosft.studies.search.presets import place, preset
from autosft.studies.search.space import FixedSettings, SearchSpace, default_parameters, settings_from
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings

#: Minimum number of peers if no trial may be stopped.
NEVER = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What follows from a method and the devices that are used for it."""

    space: SearchSpace
    fixed: FixedSettings
    pinned: PinnedSettings
    way: MemoryWay  # of holding what is trained
    settings: TrainingSettings  # the default configuration
    plan: ExecutionPlan  # of the default configuration, on the device with the least memory
    speedup_in_bf16: float | None = None  # over fp32, predicted, of a CPU that trains in bf16 by default


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """A study as designed before its first trial."""

    name: str
    participants: Participants[Basis]
    slots: tuple[Slots, ...]  # of the devices available at the start
    share: Callable[[DeviceProfile], Slots | None]  # how a device that joins later is shared
    rule: PruningRule
    budget: Budget
    strategies: tuple[tuple[Mapping[str, Value], str], ...]  # (parameters, origin) of a preset's trials

    @property
    def basis(self) -> Basis:
        return self.participants.basis

    @property
    def weakest(self) -> DeviceProfile:
        """Return the device with the least memory."""
        return self.participants.devices[0]


def design_study(request: TuneRequest, facts: StudyFacts) -> Design:
    """Decide everything about a study that is decided before its first trial.

    Raises UserError (DoesNotFitError) if the request fits on no device.
    """
    participants = choose_participants(request, facts.hardware.devices, partial(basis_on, request, facts))
    basis = participants.basis
    share = sharing_policy(
        request,
        participants,
        pinned=basis.pinned,
        plan_within=partial(default_plan_within, basis, costs=facts.models.costs),
        is_mps_on=facts.is_mps_on,
    )
    slots = tuple(shared for device in participants.devices if (shared := share(device)) is not None)
    participants = replace(participants, basis=as_started(basis, slots[0], facts.models.costs))
    rule = pruning_rule(request)
    return Design(
        name=request.study or study_name(request, facts, basis.space, basis.way),
        participants=participants,
        slots=slots,
        share=share,
        rule=rule,
        budget=study_budget(request, facts, participants, slots=slots, rule=rule),
        strategies=preset_trials(request, basis.space),
    )


# The basis: what is searched, what is pinned, and the plan of the default configuration


def basis_on(request: TuneRequest, facts: StudyFacts, choice: DeviceChoice) -> Basis:
    """Return the basis of a study with a method on some devices.

    Memory is planned for the device with the least of it; numerics are pinned for the least capable device.
    Raises DoesNotFitError if the default configuration does not fit.
    """
    request = held(request, choice.way)
    fixed = fixed_settings(request, num_available=facts.data.train.num_examples)
    space = study_space(
        request,
        method=choice.method,
        num_parameters=facts.model.num_parameters,
        num_examples=fixed.num_train_examples,
        longest=facts.longest,
        default_seq_len=facts.default_seq_len,
        devices_per_trial=choice.devices_per_trial,
    )
    settings = settings_from(space, default_parameters(space), fixed)
    require_trainable(facts.model, choice.method, space, fixed)
    pinned = pinned_settings(request, facts, choice, space=space, settings=settings)
    require_optimizers(space, pinned, choice)
    fast = None
    if request.precision == "auto":
        fast = default_in_bf16(settings, pinned, choice, facts.models)
    speedup, pinned, plan = fast or (None, pinned, plan_default(settings, pinned, choice, facts.models.costs))
    return Basis(
        space=space,
        fixed=fixed,
        pinned=replace(pinned, eval_micro_batch=min(MAX_EVAL_MICRO_BATCH, plan.micro_batch)),
        way=choice.way,
        settings=settings,
        plan=plan,
        speedup_in_bf16=speedup,
    )


def default_in_bf16(
    settings: TrainingSettings, pinned: PinnedSettings, choice: DeviceChoice, models: Models
) -> tuple[float, PinnedSettings, ExecutionPlan] | None:
    """Return speedup, numerics and default plan of a study on CPUs that train in bf16 autocast by default.

    None where fp32 is the default, or where it alone fits.
    """
    ratios = [speedup_in_bf16(models, settings, pinned, device) for device in choice.devices]
    known = [ratio for ratio in ratios if ratio is not None]
    if not known or len(known) < len(ratios):
        return None
    faster = in_bf16(pinned)
    try:
        plan = plan_default(settings, faster, choice, models.costs)
    except planner.DoesNotFitError:
        return None
    return None if plan.measures_itself else (min(known), faster, plan)


def held(request: TuneRequest, way: MemoryWay) -> TuneRequest:
    """Return a request with the precision and the optimizer of a way to hold what is trained."""
    if way.precision is None:
        return request
    space = {**request.space, "optimizer": way.optimizer}
    return request.model_copy(update={"precision": way.precision.value, "space": space})


def require_trainable(model: ModelProfile, method: Method, space: SearchSpace, fixed: FixedSettings) -> None:
    """Raise UserError if stored weights do not permit the method, or if the adapter matches no layer."""
    require_method(model.source, model.quantization, method)
    targets = space["lora_targets"]
    for value in targets.values if isinstance(targets, Choices) else (targets.start(),):
        settings = settings_from(space, {**default_parameters(space), "lora_targets": value}, fixed)
        if settings.adapter is not None and settings.adapter.targets != "all-linear":
            num_trained(model.config_json, settings.adapter, trust_remote_code=model.trust_remote_code)


def require_optimizers(space: SearchSpace, pinned: PinnedSettings, choice: DeviceChoice) -> None:
    """Raise UserError for an optimizer that does not do on these devices what trials may ask of it."""
    names, decay = space["optimizer"], space["weight_decay"]
    for name in names.values if isinstance(names, Choices) else (names.start(),):
        require_optimizer(
            str(name),
            method=choice.method,
            on_gpu=choice.devices[0].kind.traits.has_own_memory,
            precision=pinned.precision,
            largest_decay=largest(decay),
        )


def largest(dimension: Dimension) -> float:
    """Return the largest number that a dimension can take."""
    if isinstance(dimension, Range):
        return float(dimension.high)
    values = dimension.values if isinstance(dimension, Choices) else (dimension.value,)
    return max(float(value) for value in values)


def pinned_settings(
    request: TuneRequest,
    facts: StudyFacts,
    choice: DeviceChoice,
    *,
    space: SearchSpace,
    settings: TrainingSettings,
) -> PinnedSettings:
    """Return what all trials have in common because scores depend on it; the evaluation batch is not set yet.

    Raises UserError for a precision that cannot be trained in and for evaluation examples without an answer.
    """
    least_capable = numerics.least_capable(choice.devices)
    eval_seq_len = max(lengths_of(space["seq_len"], facts.longest))
    precision = numerics.study_precision(request.precision, least_capable, choice.method)
    require_usable_lengths(request, facts, eval_seq_len, settings)
    return PinnedSettings(
        precision=precision,
        tf32=numerics.has_tf32(least_capable),
        attention=facts.model.attention,
        eval_seq_len=eval_seq_len,
        eval_micro_batch=0,
        eval_fingerprint=facts.eval_fingerprint(eval_seq_len),
        num_evaluations=request.evaluations,
        loss=facts.loss,
        trainer=facts.trainer,
        generation=facts.generation,
        padding_free=request.padding_free,
        prompts_fingerprint="" if facts.prompts is None else facts.prompts.fingerprint,
    )


def require_usable_lengths(
    request: TuneRequest, facts: StudyFacts, eval_seq_len: int, settings: TrainingSettings
) -> None:
    """Raise UserError if examples of this length cannot be trained on, or have no answer to score."""
    if request.padding_free:
        require_padding_free(
            facts.model,
            adapter=adapter_kind(settings.adapter),
            longest=eval_seq_len,
            has_own_code=facts.loss is not None or facts.trainer is not None,
        )
    lengths = facts.models.eval_lengths
    if lengths is not None and not any(lengths(eval_seq_len).scored):
        raise UserError(
            f"no evaluation example has an answer within the first {eval_seq_len} tokens.",
            remedy="Choose a longer --seq-len, or give other --eval-data.",
        )


def plan_default(
    settings: TrainingSettings, pinned: PinnedSettings, choice: DeviceChoice, costs: planner.Costs
) -> ExecutionPlan:
    """Plan the default configuration on the device with the least memory, or on several of its kind."""
    smallest = choice.devices[0]
    divides = settings.effective_batch_size % choice.devices_per_trial == 0
    room = planner.Room(
        device=smallest,
        budget_bytes=usable_bytes(smallest),
        num_devices=choice.devices_per_trial if divides else 1,
    )
    return plan_or_measure(settings, pinned, room, costs, choice.measuring)


# What follows from the basis


def default_plan_within(
    basis: Basis, device: DeviceProfile, budget_bytes: int, *, costs: planner.Costs
) -> ExecutionPlan | None:
    """Plan the default configuration within part of a device; return None if it does not fit.

    How many trials could share a device is decided before the first trial has measured itself: guesses of its
    memory are treated as predictions.
    """
    room = planner.Room(device=device, budget_bytes=budget_bytes)
    taken = costs.taking_guesses() if basis.plan.measures_itself else costs
    try:
        return planner.plan(basis.settings, basis.pinned, room, taken)
    except planner.DoesNotFitError:
        return None


def as_started(basis: Basis, slots: Slots, costs: planner.Costs) -> Basis:
    """Return the basis with the default configuration planned as the first trial will be: sharing decided.

    How many trials share a device decides the threads and the memory of each, and with them which micro batch
    is the fastest (`scheduler.loop.plan_trial.rooms_to_try`).
    """
    if basis.plan.measures_itself:
        return basis
    usable = usable_bytes(slots.device)
    for budget_bytes in (usable // slots.num_slots, usable):
        room = planner.Room(
            device=slots.device,
            budget_bytes=budget_bytes,
            num_threads=slots.num_threads,
            num_devices=basis.plan.data_parallel,
        )
        with contextlib.suppress(planner.DoesNotFitError):
            return replace(basis, plan=planner.plan(basis.settings, basis.pinned, room, costs))
    return basis


def pruning_rule(request: TuneRequest) -> PruningRule:
    """Return when trials are stopped; never with --no-prune."""
    if not request.prune:
        return PruningRule(num_rungs=request.evaluations, min_peers=NEVER)
    return PruningRule(
        num_rungs=request.evaluations, pauses=request.rungs == "pause", thaws=request.rungs == "freeze-thaw"
    )


def study_budget(
    request: TuneRequest,
    facts: StudyFacts,
    participants: Participants[Basis],
    *,
    slots: Sequence[Slots],
    rule: PruningRule,
) -> Budget:
    """Return how many trials the study runs, and how long that is predicted to take."""
    basis, weakest, models = participants.basis, participants.devices[0], facts.models
    plan, pinned, num_threads = basis.plan, basis.pinned, slots[0].num_threads
    recipe = replace(
        planner.recipe_for(basis.settings, pinned, plan.checkpointing, plan.gradient_accumulation),
        sharding=plan.sharding,
        data_parallel=plan.data_parallel,
    )
    speed = models.speed(recipe, plan.micro_batch, basis.settings, weakest, num_threads)
    evaluation_s = models.evaluation_s(
        pinned.eval_seq_len,
        weakest,
        num_threads,
        precision=pinned.precision,
        micro_batch=pinned.eval_micro_batch,
    )
    return plan_budget(
        num_trials=request.trials,
        time_budget_s=request.time_budget,
        budget_runs=request.budget_runs,
        num_slots=num_concurrent(slots, participants.devices_per_trial, request.max_concurrent),
        full_run_s=speed.run_s * sharing_slowdown(slots[0], plan, is_mps_on=facts.is_mps_on),
        evaluation_s=evaluation_s,
        untuned_s=untuned_s(speed.run_time),
        rule=rule,
        prune=request.prune,
        epochs=request.epochs,
    )


def untuned_s(run_time: RunTime | None) -> float:
    """Return the predicted seconds of scoring the untuned model: a run's start and one evaluation."""
    return 0.0 if run_time is None else run_time.start_s + run_time.evaluation_s + run_time.answers_s


def num_concurrent(slots: Sequence[Slots], devices_per_trial: int, at_most: int | None) -> int:
    """Return how many trials run at once, if there are enough of them."""
    together = max(1, sum(shared.num_slots for shared in slots) // devices_per_trial)
    return min(together, at_most or together)


def sharing_slowdown(slots: Slots, plan: ExecutionPlan, *, is_mps_on: bool) -> float:
    """Return the factor by which sharing a GPU slows a trial down; CPU trials do not share cores."""
    if slots.device.kind.traits.is_split_by_cores:
        return 1.0
    overhead = assumed_overhead(slots.device, is_mps_on=is_mps_on)
    return slowdown(slots.num_slots * plan.device_share, slots.num_slots, overhead)


def preset_trials(request: TuneRequest, space: SearchSpace) -> tuple[tuple[Mapping[str, Value], str], ...]:
    """Return (parameters, origin) of the preset's strategies, moved into the search space."""
    if request.preset is None:
        return ()
    chosen = preset(request.preset)
    return tuple((place(strategy, space)[0], chosen.origin(strategy)) for strategy in chosen.strategies)


def study_name(request: TuneRequest, facts: StudyFacts, space: SearchSpace, way: MemoryWay = EXACT) -> str:
    """Name a study after its model and data, with a hash of everything that distinguishes it from others."""
    model, data = facts.model, facts.data
    identity = (
        model.fingerprint,
        data.fingerprint,
        request.metric,
        request.evaluations,
        request.epochs,
        request.max_train_samples,
        request.precision,
        request.seed,
        str(space),
        *((request.adapter,) if request.adapter != "lora" else ()),
        *(("padding-free",) if request.padding_free else ()),
        *((way.name,) if way is not EXACT else ()),
    )
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:6]
    return f"{Path(model.source).name}-{facts.data_name}-{digest}"
