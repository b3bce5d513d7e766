"""Decides what a study is: what is pinned, what is searched, how many trials, on which slots.  Pure.

Reads its inputs (request, hardware, model, data) and answers with values and with the plan in words.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import load_from_disk

from autosft.profiles.dataset.prepared import (
    PreparedData,
    Split,
    choose_seq_len,
    eval_fingerprint,
    length_profile,
)
from autosft.profiles.dataset.sources import short_name
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import ClusterProfile, DeviceKind, DeviceProfile
from autosft.profiles.memory.padding_free import require_padding_free
from autosft.profiles.memory.trainable import num_trained
from autosft.profiles.model.adapters import unused_settings
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.model.quantization import require_method
from autosft.profiles.recipe import Generation, Method, Precision, adapter_kind, why_not_trained
from autosft.profiles.user_code import find
from autosft.profiles.user_trainer import find_trainer
from autosft.scheduler.decide import numerics, planner
from autosft.scheduler.decide.budget import Budget, plan_budget
from autosft.scheduler.decide.cost_models import Answers, Models
from autosft.scheduler.decide.history import NOTHING_LEARNED, Learned
from autosft.scheduler.decide.measured_memory import MAX_EVAL_MICRO_BATCH
from autosft.scheduler.decide.numerics import can_take_part
from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.decide.search_space import (
    batches_of,
    default_batches,
    examples_of_strategies,
    lengths_of,
    within_reach,
)
from autosft.scheduler.decide.self_measuring import Measuring, plan_or_measure
from autosft.scheduler.decide.sharing import assumed_overhead, is_mps_on, slowdown
from autosft.scheduler.loop.disk import checkpoint_bytes
from autosft.scheduler.loop.tuning import Slots, StudyRun, usable_bytes
from autosft.scheduler.setup.device_selection import choose_participants, share_device
from autosft.scheduler.setup.plan_summary import in_words
from autosft.scheduler.setup.preset_summary import preset_words
from autosft.scheduler.setup.prompt_set import PromptSet
from autosft.scheduler.study_run import sort_of
from autosft.studies.metrics import find_metric
from autosft.studies.request import TuneRequest
from autosft.studies.search.dimensions import Choices, Fixed, Value
from autosft.studies.search.presets import place, preset
from autosft.studies.search.settings import SETTINGS
from autosft.studies.search.space import (
    FixedSettings,
    SearchSpace,
    default_parameters,
    default_space,
    settings_from,
)
from autosft.studies.trial import ExecutionPlan, PinnedSettings
from autosft.studies.values import Direction, StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """A study before it is in the database."""

    spec: StudySpec
    run: StudyRun  # without its output folder, which is made last
    default_parameters: Mapping[str, Value]
    default_plan: ExecutionPlan
    budget: Budget
    lines: tuple[str, ...]  # the plan in words
    strategies: tuple[tuple[Mapping[str, Value], str], ...] = ()  # (parameters, origin) of a preset


def design_study(
    request: TuneRequest,
    hardware: ClusterProfile,
    model: ModelProfile,
    data: PreparedData,
    *,
    answers: Answers | None = None,
    learned: Learned = NOTHING_LEARNED,
    cache_dir: Path | None = None,
    generation: Generation | None = None,
) -> Design:
    """Decide everything about a study that is decided before its first trial.

    `answers` is what the model is asked at each evaluation, `learned` what earlier trials have taught the
    models of memory and speed; traces are kept in `cache_dir`.
    `generation`: the longest prompts and answers of a metric of prompts, as their memory goes.

    Raises UserError (DoesNotFitError) when what was asked for fits on no device.
    """
    models = Models.of_data(
        model, data, request.evaluations, answers=answers, learned=learned, cache_dir=cache_dir
    )
    taking_part = choose_participants(
        request,
        hardware.devices,
        lambda method, devices, number, measuring: basis(
            request, method, devices, number, model, data, models, generation, measuring
        ),
    )
    weakest = taking_part.devices[0]
    space, fixed, pinned, plan = taking_part.basis
    defaults = default_parameters(space)
    settings = settings_from(space, defaults, fixed)
    mps = is_mps_on()
    # How many trials could share a device is decided before the first of them has measured itself.
    sharing_costs = models.costs.taking_guesses() if plan.measures_itself else models.costs

    def plan_within(device: DeviceProfile, budget_bytes: int) -> ExecutionPlan | None:
        try:
            return planner.plan(
                settings, pinned, planner.Room(device=device, budget_bytes=budget_bytes), sharing_costs
            )
        except planner.DoesNotFitError:
            return None

    shared: dict[str, Slots] = {}  # by sort of device: hundreds may be alike

    def share(device: DeviceProfile) -> Slots | None:
        if not can_take_part(device, pinned, weakest.kind):
            return None
        sort = sort_of(device)
        if sort not in shared:
            shared[sort] = share_device(
                device,
                plan_within,
                request=request,
                num_devices=len(taking_part.devices),
                devices_per_trial=taking_part.num_devices,
                is_mps_on=mps,
            )
        return replace(shared[sort], device=device)

    slots = tuple(slot for device in taking_part.devices if (slot := share(device)) is not None)
    rule = PruningRule(num_rungs=request.evaluations, pauses=request.prune and request.rungs == "pause")
    run = StudyRun(
        name=request.study or study_name(request, model, data, space),
        model=model.source,
        data_dir=str(data.path),
        output_dir=Path(),
        metric=request.metric,
        minimize=find_metric(request.metric).minimize,
        num_trials=0,
        deadline=None if request.time_budget is None else time.time() + request.time_budget,
        pinned=pinned,
        rule=rule if request.prune else replace(rule, min_peers=1 << 30),
        slots=slots,
        keep_best=request.keep_best,
        checkpoint_bytes=checkpoint_bytes(plan, settings.method),
        disk_budget=request.disk_budget,
        trust_remote_code=request.trust_remote_code,
        report_to=request.report_to,
        target=request.target_value(),
        allow_degrade=request.allow_degrade,
        estimate=models.predict,
        speed=models.speed,
        measured=models.costs.measured,
        max_concurrent=request.max_concurrent,
        max_devices_per_trial=request.max_gpus_per_trial,
        is_mps_on=mps,
        share=share,
    )
    recipe = replace(
        planner.recipe_for(settings, pinned, plan.checkpointing, plan.gradient_accumulation),
        sharding=plan.sharding,
        data_parallel=plan.data_parallel,
    )
    speed = models.speed(recipe, plan.micro_batch, settings, weakest, slots[0].num_threads)
    budget = plan_budget(
        num_trials=request.trials,
        time_budget_s=request.time_budget,
        num_slots=num_at_once(slots, taking_part.num_devices, request.max_concurrent),
        full_run_s=speed.run_s * shared_slowdown(slots[0], plan, is_mps_on=mps),
        evaluation_s=models.evaluation_s(
            pinned.eval_seq_len,
            weakest,
            slots[0].num_threads,
            precision=pinned.precision,
            micro_batch=pinned.eval_micro_batch,
        ),
        rule=rule,
        prune=request.prune,
    )
    run = replace(run, num_trials=budget.num_trials)
    spec = StudySpec(
        name=run.name,
        metric=request.metric,
        direction=Direction.MINIMIZE if run.minimize else Direction.MAXIMIZE,
        model=model.source,
        model_fingerprint=model.fingerprint,
        data=data.source,
        data_fingerprint=data.fingerprint,
        pinned=pinned,
        fixed=fixed,
        space=space,
        seed=request.seed,
        num_trials=budget.num_trials,
        environment={},
    )
    lines = in_words(request, model, data, space, settings, pinned, plan, slots, budget, taking_part)
    strategies: list[tuple[Mapping[str, Value], str]] = []
    if request.preset is not None:
        chosen = preset(request.preset)
        strategies = [(place(one, space)[0], chosen.origin(one)) for one in chosen.strategies]
        lines += tuple(
            preset_words(
                chosen,
                space,
                fixed,
                pinned,
                device=weakest,
                estimate=models.estimate,
                speed=models.speed,
                num_threads=slots[0].num_threads,
            )
        )
    return Design(
        spec=spec,
        run=run,
        default_parameters=defaults,
        default_plan=plan,
        budget=budget,
        lines=lines,
        strategies=tuple(strategies),
    )


# What is decided, in this order


Basis = tuple[SearchSpace, FixedSettings, PinnedSettings, ExecutionPlan]


def basis(
    request: TuneRequest,
    method: Method,
    devices: Sequence[DeviceProfile],
    num_devices: int,
    model: ModelProfile,
    data: PreparedData,
    models: Models,
    generation: Generation | None = None,
    measuring: Measuring = Measuring.ANYWAY,
) -> Basis:
    """Return space, fixed settings, pinned settings and the default's plan; raises DoesNotFitError.

    `devices` are all that take part, the one with the least memory first, of which a trial takes
    `num_devices`; numerics are pinned for the least capable.
    """
    device = devices[0]
    least_capable = min(devices, key=lambda one: (one.supports_bf16, one.compute_capability or (0, 0)))
    longest = model.max_positions or data.train.longest
    seq_len = choose_seq_len(data, longest).seq_len
    num_usable = min(data.train.num_examples, request.max_train_samples or data.train.num_examples)
    num_examples = max(1, round(request.epochs * num_usable))
    overrides = within_reach(request, longest=longest, num_examples=num_examples)
    # what the adapter does not take is not searched
    overrides |= {
        name: Fixed(value=unused)
        for name in unused_settings(request.adapter)
        if (unused := SETTINGS[name].unused) is not None
    }
    asked_batch = overrides.get("effective_batch_size")
    asked_len = overrides.get("seq_len")
    space = default_space(
        method=method,
        num_parameters=model.num_parameters,
        num_train_examples=num_examples,
        seq_lens=[seq_len] if asked_len is None else lengths_of(asked_len, longest),
        effective_batch_sizes=default_batches(num_examples, num_devices)
        if asked_batch is None
        else batches_of(asked_batch, num_examples),
        overrides=overrides,
    )
    fixed = FixedSettings(
        num_train_examples=num_examples,
        seed=request.seed,
        max_train_samples=request.max_train_samples,
        examples_of=examples_of_strategies(request, num_usable),
        adapter=request.adapter,
    )
    settings = settings_from(space, default_parameters(space), fixed)
    require_method(model.source, model.quantization, method)
    require_adapters(model, space, fixed)
    precision = (
        numerics.pin_precision(least_capable, method)
        if request.precision == "auto"
        else Precision(request.precision)
    )
    if reason := why_not_trained(method, precision):
        raise UserError(
            f"--method {method.value} --precision {precision.value}: {reason}.",
            remedy=f"Use --precision {Precision.FP16_AUTOCAST.value}, or --method lora: adapters are fp32.",
        )
    if precision.scales_loss and least_capable.kind is DeviceKind.CPU:
        raise UserError(
            f"--precision {precision.value} needs a GPU: its loss scaler and its arithmetic are CUDA's.",
            remedy=f"On the CPU use {Precision.FP32.value}, {Precision.BF16_AUTOCAST.value} or "
            f"{Precision.BF16.value}.",
        )
    eval_seq_len = max(lengths_of(space["seq_len"], longest))
    if request.padding_free:
        require_padding_free(
            model,
            adapter=adapter_kind(settings.lora),
            longest=eval_seq_len,
            has_own_code=request.loss is not None or request.trainer is not None,
        )
    if not any(length_profile(data, eval_seq_len, Split.EVAL).scored):
        raise UserError(
            f"no evaluation example has an answer within the first {eval_seq_len} tokens.",
            remedy="Choose a longer --seq-len, or give other --eval-data.",
        )
    pinned = PinnedSettings(
        precision=precision,
        tf32=device.kind is DeviceKind.CUDA and (least_capable.compute_capability or (0, 0)) >= (8, 0),
        attention=model.attention,
        eval_seq_len=eval_seq_len,
        eval_micro_batch=0,
        eval_fingerprint=eval_fingerprint(load_from_disk(str(data.split_dir(Split.EVAL))), eval_seq_len),
        num_evaluations=request.evaluations,
        loss=None if request.loss is None else find(request.loss, flag="--loss"),
        trainer=None if request.trainer is None else find_trainer(request.trainer),
        generation=generation,
        padding_free=request.padding_free,
    )
    room = planner.Room(
        device=device,
        budget_bytes=usable_bytes(device),
        num_devices=num_devices if settings.effective_batch_size % num_devices == 0 else 1,
    )
    plan = plan_or_measure(settings, pinned, room, models.costs, measuring)
    pinned = replace(pinned, eval_micro_batch=min(MAX_EVAL_MICRO_BATCH, plan.micro_batch))
    return space, fixed, pinned, plan


def num_at_once(slots: Sequence[Slots], devices_per_trial: int, at_most: int | None) -> int:
    """Return how many trials run at once when there are enough of them."""
    together = max(1, sum(one.num_slots for one in slots) // devices_per_trial)
    return min(together, at_most or together)


def shared_slowdown(slots: Slots, plan: ExecutionPlan, *, is_mps_on: bool) -> float:
    """Return by how much a trial takes longer for those that share its GPU; CPU trials have their cores."""
    if slots.device.kind is DeviceKind.CPU:
        return 1.0
    overhead = assumed_overhead(slots.device, is_mps_on=is_mps_on)
    return slowdown(slots.num_slots * plan.device_share, slots.num_slots, overhead)


def require_adapters(model: ModelProfile, space: SearchSpace, fixed: FixedSettings) -> None:
    """Raise UserError where an adapter of the search does not fit the model's layers."""
    targets = space["lora_targets"]
    for value in targets.values if isinstance(targets, Choices) else (targets.start(),):
        settings = settings_from(space, {**default_parameters(space), "lora_targets": value}, fixed)
        if settings.lora is not None and settings.lora.targets != "all-linear":
            num_trained(model.config_json, settings.lora, trust_remote_code=model.trust_remote_code)


def study_name(request: TuneRequest, model: ModelProfile, data: PreparedData, space: SearchSpace) -> str:
    """Name a study after its model and data, and by a hash of all that makes it this study and no other."""
    what = (
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
    )
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:6]
    return f"{Path(model.source).name}-{short_name(data.source)}-{digest}"


def with_prompts(design: Design, given: PromptSet, output: Path) -> Design:
    """Write the prompts into the study's folder and pin them; a study of other prompts is another one."""
    pinned = replace(design.run.pinned, prompts_fingerprint=given.fingerprint)
    return replace(
        design,
        spec=replace(design.spec, pinned=pinned),
        run=replace(
            design.run,
            pinned=pinned,
            scoring=given.written_to(output),
        ),
        lines=design.lines + given.lines(design.default_plan),
    )
