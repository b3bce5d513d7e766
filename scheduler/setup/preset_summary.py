"""What a preset's strategies become in a study, and what its choices save on this model and device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from autosft.profiles.recipe import Checkpointing, MemoryEstimate, Precision, StepRecipe
from autosft.profiles.units import gib
from autosft.scheduler.decide.planner import Costs, recipe_for
from autosft.scheduler.setup.design import Design
from autosft.studies.formatting import format_settings
from autosft.studies.search.dimensions import Value
from autosft.studies.search.presets import Preset, Strategy, place
from autosft.studies.search.space import FixedSettings, SearchSpace, settings_from
from autosft.studies.trial import TrainingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The predicted cost of a step."""

    memory: MemoryEstimate
    tokens_per_s: float


def preset_summary(preset: Preset, design: Design, costs: Costs) -> Iterator[str]:
    """Describe what each strategy becomes in this study, and what the preset's choices save.

    Savings are predicted for the first strategy at micro batch 1.
    """
    basis = design.basis
    yield f"Preset {preset.name}: {preset.summary} ({preset.source})."
    for strategy in preset.strategies:
        yield "  " + strategy_line(strategy, preset, basis.space, basis.fixed)
    first = preset.strategies[0]
    yield f"What its choices save here (predicted, strategy {first.name}, micro batch 1):"
    parameters, _ = place(first, basis.space)
    settings = settings_from(basis.space, parameters, basis.fixed)
    cost = cost_model(design, costs, settings)
    recipe = recipe_for(settings, basis.pinned, Checkpointing.NON_REENTRANT, settings.effective_batch_size)
    here = cost(recipe, settings.seq_len)
    without = cost(replace(recipe, checkpointing=Checkpointing.OFF), settings.seq_len)
    yield "  " + saving("activation checkpointing", here, without)
    if basis.pinned.precision is Precision.FP32:
        traits = design.weakest.kind.traits
        reason = "the study is pinned to" if traits.trains_in_16_bit else f"a {traits.label} computes in"
        yield f"  16-bit arithmetic: none, {reason} fp32."
    else:
        exact = cost(replace(recipe, precision=Precision.FP32), settings.seq_len)
        yield "  " + saving(f"16-bit arithmetic ({basis.pinned.precision.value})", here, exact)
    for seq_len in sorted(other_lengths(basis.space, settings)):
        yield "  " + saving(f"length {settings.seq_len:,}", here, cost(recipe, seq_len), f"{seq_len:,}")


def cost_model(design: Design, costs: Costs, settings: TrainingSettings) -> Callable[[StepRecipe, int], Cost]:
    """Return a function that predicts a recipe's cost at a length, at micro batch 1 on the weakest device."""
    device, num_threads = design.weakest, design.slots[0].num_threads

    def cost(recipe: StepRecipe, seq_len: int) -> Cost:
        speed = costs.speed(recipe, 1, replace(settings, seq_len=seq_len), device, num_threads)
        return Cost(
            memory=costs.memory_of(recipe, 1, seq_len, device),
            tokens_per_s=speed.tokens_per_s,
        )

    return cost


def strategy_line(strategy: Strategy, preset: Preset, space: SearchSpace, fixed: FixedSettings) -> str:
    """Describe a strategy in one line, with its number of steps in this study."""
    parameters, moved = place(strategy, space)
    settings = settings_from(space, parameters, fixed.of(preset.origin(strategy)))
    num_steps = max(1, settings.num_train_examples // settings.effective_batch_size)
    line = f"{strategy.name} ({strategy.summary}): {format_settings(all_values(parameters, space), {})}, "
    line += f"{num_steps:,} steps"
    if settings.num_train_examples != fixed.num_train_examples:
        line += f", {strategy.epochs:g} epochs: {settings.num_train_examples:,} examples"
        line += f" where other trials get {fixed.num_train_examples:,}"
    return line + (f"; changed: {', '.join(moved)}" if moved else "")


def all_values(parameters: Mapping[str, Value], space: SearchSpace) -> tuple[tuple[str, Value], ...]:
    """Return the values that a strategy sets, in the order of the search space."""
    return tuple((name, parameters[name]) for name, _ in space.items if name in parameters)


def other_lengths(space: SearchSpace, settings: TrainingSettings) -> set[int]:
    """Return the other truncation lengths in the search space."""
    values = getattr(space["seq_len"], "values", ())
    return {int(length) for length in values if length != settings.seq_len}


def saving(choice: str, here: Cost, other: Cost, instead: str = "") -> str:
    """Describe what a choice saves in memory and costs in speed, compared with another."""
    ours, theirs = here.memory.need.median_bytes, other.memory.need.median_bytes
    share = abs(theirs - ours) / max(1, theirs, ours)
    verb = "saves" if theirs >= ours else "costs"
    slower = 1 - here.tokens_per_s / other.tokens_per_s
    pace = "at the same speed"
    if abs(slower) >= 0.005:
        pace = f"{abs(slower):.0%} {'fewer' if slower > 0 else 'more'} tokens/s"
    at = f" at {instead}" if instead else ""
    return f"{choice}: {gib(ours)} instead of {gib(theirs)}{at}, {verb} {share:.0%}, {pace}."
