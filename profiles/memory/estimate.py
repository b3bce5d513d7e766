"""Predict the memory of a training run: the memory model's interface to plans.

A run is a sequence of segments: loading the model, micro batches drawn from the data's lengths, optimizer
steps, a rehearsal of the worst batch after the first step (as our trainer does it), an evaluation.  Each
segment is a program (see `program`); its live bytes are added up, and it is replayed through the simulated
allocator.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from autosft.profiles.answer_cache import AnswerCache, key_of
from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.profiles.hardware.device_kinds import Capability
from autosft.profiles.memory import peak_summary
from autosft.profiles.memory.allocator.options import AllocatorOptions
from autosft.profiles.memory.allocator.trial_settings import options_of_trials
from autosft.profiles.memory.batches import Batch, Order, draw_order, draw_row_order, evaluation_batch
from autosft.profiles.memory.calibration import Bound, Calibration, bound_for, fingerprint
from autosft.profiles.memory.closed_form import closed_form
from autosft.profiles.memory.program.blocks import Owner
from autosft.profiles.memory.program.program import CompiledSegment, Shape
from autosft.profiles.memory.program.run import Run
from autosft.profiles.memory.sharding import bytes_by_layer, sharded
from autosft.profiles.memory.trace.trace_errors import OTHERWISE, Untraceable
from autosft.profiles.optimizers import OPTIMIZERS
from autosft.profiles.recipe import (
    ByteRange,
    LengthProfile,
    MemoryEstimate,
    Method,
    Sharding,
    StepRecipe,
)

if TYPE_CHECKING:
    from autosft.profiles.memory.program_cache import StepPrograms

#: The smallest sufficient cap is searched to within this share of the uncapped peak.
CAP_TOLERANCE = 1 / 128
NUM_BATCHES = 4
#: Extra bound for FSDP2 around a user's trainer, which is computed by formula, not traced.
SHARDING_UPPER_RATIO = 1.1
#: Extra bound where an operator could not be traced: as wide as the closed form's, without a guarantee.
UNTRACED_UPPER_RATIO = 1.5


class ModelConfig(Protocol):
    """What the memory model needs to know about a model: its transformers configuration."""

    @property
    def config_json(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Evaluation between training steps: `micro_batch` examples of these lengths at a time."""

    micro_batch: int
    lengths: LengthProfile


#: Masks are unpacked this many weights at a time, to one byte each.
MASK_WORKING_BYTES = 1 << 24


def estimate(
    model: ModelConfig | str,
    recipe: StepRecipe,
    micro_batch: int,
    lengths: LengthProfile,
    device: DeviceProfile,
    *,
    calibration: Calibration | None = None,
    cache_dir: Path | None = None,
    seed: int = 0,
    allocator: AllocatorOptions | None = None,
    evaluation: Evaluation | None = None,
) -> MemoryEstimate:
    """Predict the peak memory of training with `recipe` and `micro_batch`.

    `model` is a configuration in transformers' JSON, or an object that has it as `config_json`.  Without
    `evaluation`, evaluation batches are assumed to be like the largest training batch.  Where the recipe has
    a `generation`, its longest prompts are answered at evaluations as well, one at a time; workers batch them
    only as memory allows (`workers.scoring.generation`).  Without `allocator`, the settings are those of a
    trial started from this process: PYTORCH_ALLOC_CONF's, else expandable segments where the system has them.

    Medians come from a trace of the step on torch's meta device and a replay through a simulated allocator,
    upper bounds from `calibration` (see there).  Traced steps are cached in `cache_dir`.  Where the step
    cannot be traced, the estimate is the closed form's and `untraced` gives the reasons: such an estimate
    must not be taken as "fits".  Raises UserError for optimizers with unknown memory and unsimulated
    allocator settings.
    """
    config_json, trusted = (model, False) if isinstance(model, str) else _config_of(model)
    if allocator is None:
        caches = device.traits.has_caching_allocator
        allocator = options_of_trials(os.environ) if caches else AllocatorOptions()
    return _kept_estimate(
        config_json,
        recipe,
        micro_batch,
        lengths,
        trusted=trusted,
        kind=device.kind,
        capability=device.compute_capability,
        context_bytes=device.context_bytes,
        device_name=device.name,
        calibration=calibration,
        cache_dir=cache_dir,
        seed=seed,
        allocator=allocator,
        evaluation=evaluation,
    )


def allocated_bytes(
    model: ModelConfig | str,
    recipe: StepRecipe,
    micro_batch: int,
    lengths: LengthProfile,
    device: DeviceProfile,
    *,
    cache_dir: Path | None = None,
    seed: int = 0,
) -> int:
    """Return the peak bytes of the step's own tensors on one device; takes a millisecond once it is traced.

    A lower bound of what is needed: what it rules out needs no `estimate`.  Raises Untraceable.
    """
    from autosft.profiles.memory.program_cache import step_programs

    config_json, trusted = (model, False) if isinstance(model, str) else _config_of(model)
    programs = step_programs(
        config_json, recipe, device.kind, device.compute_capability, trusted=trusted, cache_dir=cache_dir
    )
    run, _ = run_of(programs, recipe, micro_batch, lengths, capability=device.compute_capability, seed=seed)
    return run.allocated_bytes()


def _config_of(model: ModelConfig) -> tuple[str, bool]:
    return model.config_json, model.trust_remote_code


@functools.lru_cache(maxsize=4096)
def _kept_estimate(
    config_json: str,
    recipe: StepRecipe,
    micro_batch: int,
    lengths: LengthProfile,
    *,
    trusted: bool,
    cache_dir: Path | None,
    evaluation: Evaluation | None,
    **others: Any,
) -> MemoryEstimate:
    """Return an estimate from the cache, or compute and store it.

    Remote code of a model is not part of the key, so that estimates that depend on it are not cached; nor are
    estimates of untraced steps, which another installation may be able to trace.
    """
    cache = AnswerCache(None if trusted else cache_dir)
    evaluated = evaluation and (evaluation.micro_batch, _mark(evaluation.lengths))
    key = key_of(
        "memory", config_json, recipe, micro_batch, _mark(lengths), evaluated, sorted(others.items())
    )
    if (kept := cache.get(key, MemoryEstimate)) is not None:
        return kept
    answer = _estimate(
        config_json,
        recipe,
        micro_batch,
        lengths,
        trusted=trusted,
        cache_dir=cache_dir,
        evaluation=evaluation,
        **others,
    )
    if not answer.untraced:
        cache.put(key, answer)
    return answer


@functools.lru_cache(maxsize=64)
def _mark(lengths: LengthProfile) -> str:
    """Return the sha256 (hex) of lengths."""
    return hashlib.sha256(repr(lengths).encode()).hexdigest()


def _estimate(
    config_json: str,
    recipe: StepRecipe,
    micro_batch: int,
    lengths: LengthProfile,
    *,
    trusted: bool,
    kind: DeviceKind,
    capability: tuple[int, int] | None,
    context_bytes: int,
    device_name: str,
    calibration: Calibration | None,
    cache_dir: Path | None,
    seed: int,
    allocator: AllocatorOptions,
    evaluation: Evaluation | None,
) -> MemoryEstimate:
    from autosft.profiles.memory.program_cache import step_programs

    try:
        programs = step_programs(config_json, recipe, kind, capability, trusted=trusted, cache_dir=cache_dir)
        run, untraced = run_of(
            programs, recipe, micro_batch, lengths, capability=capability, seed=seed, evaluation=evaluation
        )
    except Untraceable as error:
        answer = closed_form(config_json, recipe, micro_batch, lengths, kind, outside_bytes=context_bytes)
        return dataclasses.replace(answer, untraced=(error.what,), way_out=error.remedy)
    stack = _stack(kind, device_name, recipe)
    bound = bound_for(calibration, stack)
    peak = run.peak()
    by_owner = dict(peak.by_owner)
    traits = kind.traits
    if traits.constant_bytes:
        by_owner[Owner.WORKSPACE] += traits.constant_bytes
    need = uncapped = allocated = sum(by_owner.values())
    if traits.has_caching_allocator:
        need, uncapped = run.need_bytes(allocator, tolerance=CAP_TOLERANCE)
        need = max(need, allocated)
    spread = traits.spread_bytes if bound.is_borrowed else traits.calibrated_spread_bytes
    is_sharded = recipe.sharding is not Sharding.NONE and recipe.data_parallel > 1
    is_modelled = is_sharded and recipe.sharding is Sharding.FSDP and not recipe.traces_shards
    widen = (SHARDING_UPPER_RATIO if is_modelled else 1.0) * (UNTRACED_UPPER_RATIO if untraced else 1)
    return MemoryEstimate(
        allocated=_range(allocated, bound, widen, spread),
        need=_range(need, bound, widen, spread),
        uncapped=_range(uncapped, bound, widen, spread),
        outside_bytes=context_bytes + (traits.collective_bytes if is_sharded else 0),
        components=peak_summary.components(by_owner, _range(allocated, bound, 1.0, 0).median_bytes),
        peak_phase=peak_summary.PHASE_NAMES[peak.phase],
        peak_owner=peak_summary.describe_owner(peak, by_owner, recipe),
        method=_method(recipe),
        bound_level=bound.level,
        num_calibration_rows=bound.num_rows,
        untraced=untraced,
        way_out=OTHERWISE if untraced else "",
        phases=peak_summary.phases(run, traits.constant_bytes, bound.median_ratio),
        uncalibrated_bytes=allocated,
        stack=stack,
    )


def _stack(kind: DeviceKind, device_name: str, recipe: StepRecipe) -> str:
    """Return the stack that a run's calibration row belongs to."""
    from autosft.profiles.memory.program_cache import versions

    return fingerprint(
        kind.traits.stack_prefix + device_name,
        versions(),
        recipe.method.value,
        recipe.precision.value,
        recipe.checkpointing.value + (" padding-free" if recipe.padding_free else ""),
    )


def _method(recipe: StepRecipe) -> str:
    """Describe how a traced step was predicted, and which parts are modelled instead of traced."""
    parts = ["4-bit layers"] if recipe.method is Method.QLORA else []
    row = OPTIMIZERS.get(recipe.optimizer)
    is_modelled = row is not None and bool(row.package)
    parts += [f"{recipe.optimizer}'s state"] if is_modelled else []
    return "trace and replay" + (f", {' and '.join(parts)} modelled" if parts else "")


def mask_bytes(parameter_bytes: int, recipe: StepRecipe) -> int:
    """Return the bytes that sparse fine-tuning needs beyond full: one bit per weight, and a buffer to unpack.

    An upper bound: matrices without zeros have no mask (see `workers.training.zero_masks`).
    """
    if recipe.method is not Method.SPARSE:
        return 0
    num_weights = parameter_bytes // recipe.precision.weight_bytes
    return num_weights // 8 + min(num_weights, MASK_WORKING_BYTES)


def _range(num_bytes: int, bound: Bound, widen: float, spread: int) -> ByteRange:
    median = int(num_bytes * bound.median_ratio)
    return ByteRange(
        median_bytes=median, upper_bytes=max(median, int(num_bytes * bound.upper_ratio * widen) + spread)
    )


def run_of(
    programs: StepPrograms,
    recipe: StepRecipe,
    micro_batch: int,
    lengths: LengthProfile,
    *,
    capability: tuple[int, int] | None,
    seed: int,
    evaluation: Evaluation | None = None,
) -> tuple[Run, tuple[str, ...]]:
    """Return a run over batches drawn from the data, and the names of its untraced operators."""
    order = _order(recipe, micro_batch, lengths, seed=seed)
    ordinary = [programs.as_scored(batch) for batch in order.first]
    following = min(recipe.gradient_accumulation, 2) - 1
    worst = programs.as_scored(order.worst)

    def step(batch: Batch, update: str) -> Iterator[tuple[CompiledSegment, Shape]]:
        segments = programs.for_batch(batch).segments
        is_first = update == "update first" and "micro first" in segments
        yield segments["micro first" if is_first else "micro"], batch.shape
        for _ in range(following):
            yield segments["micro next"], batch.shape
        yield segments[update], batch.shape

    programs.for_batch(worst)
    if not programs.follows_rules:  # every shape needs a trace: use the largest for all
        ordinary = [worst]
    first = programs.for_batch(ordinary[0])
    steps = [(first.segments["setup"], worst.shape)]
    if "trainer" in first.segments:  # a user's trainer
        steps.append((first.segments["trainer"], worst.shape))
    steps += step(ordinary[0], "update first")
    steps += step(worst, "update")  # the rehearsal, and the worst batch itself if it comes early
    for batch in ordinary[1:]:
        steps += step(batch, "update")
    steps += step(worst, "update")
    evaluated = worst
    if evaluation is None and recipe.padding_free:
        evaluation = Evaluation(micro_batch=micro_batch, lengths=lengths)  # evaluations have padding
    if evaluation is not None:
        evaluated = programs.as_scored(evaluation_batch(evaluation.lengths, evaluation.micro_batch))
    steps.append((programs.for_batch(evaluated).segments["evaluate"], evaluated.shape))
    untraced = dict.fromkeys(
        what for batch in (*ordinary, worst, evaluated) for what in programs.for_batch(batch).untraced
    )
    if recipe.generation is not None:
        from autosft.profiles.memory.trace.generation_step import segments_of

        short, long, window = programs.for_generation(recipe.generation)
        steps += segments_of(short, long, window, recipe.generation, 1)
        untraced |= dict.fromkeys(short.untraced + long.untraced)
    beside = sharded(first, recipe)
    kept = _workspaces(programs.kind, capability) + beside.kept
    parameters = sum(bytes_by_layer(first, "setup", Owner.PARAMETER).values()) // beside.num_shards
    if masks := mask_bytes(parameters, recipe):
        kept += ((Owner.WORKSPACE, masks),)
    return Run(steps, dataclasses.replace(beside, kept=kept)), tuple(untraced)


def _order(recipe: StepRecipe, micro_batch: int, lengths: LengthProfile, *, seed: int) -> Order:
    """Draw the micro batches of a run."""
    draw = functools.partial(draw_row_order, order=recipe.order) if recipe.padding_free else draw_order
    return draw(
        lengths,
        micro_batch,
        num_batches=NUM_BATCHES,
        seed=seed,
        per_step=recipe.gradient_accumulation * recipe.data_parallel if recipe.sorts_steps else 1,
    )


def _workspaces(kind: DeviceKind, capability: Capability | None) -> tuple[tuple[Owner, int], ...]:
    """Return the BLAS library's workspaces: one for the forward and one for the backward thread."""
    size = kind.traits.workspace_bytes(capability)
    return ((Owner.WORKSPACE, size),) * 2 if size else ()


__all__ = ["Evaluation", "ModelConfig", "UserError", "estimate"]
