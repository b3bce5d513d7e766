"""What a preset's strategies are here, and what its choices save on this model and device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.profiles.recipe import Checkpointing, MemoryEstimate, Precision, StepRecipe
from autosft.profiles.units import gib
from autosft.scheduler.decide.planner import Estimator, SpeedModel, recipe_for
from autosft.studies.formatting import format_settings
from autosft.studies.search.dimensions import Value
from autosft.studies.search.presets import Preset, Strategy, place
from autosft.studies.search.space import FixedSettings, SearchSpace, settings_from
from autosft.studies.trial import PinnedSettings, TrainingSettings


def preset_words(
    preset: Preset,
    space: SearchSpace,
    fixed: FixedSettings,
    pinned: PinnedSettings,
    *,
    device: DeviceProfile,
    estimate: Estimator,
    speed: SpeedModel,
    num_threads: int,
) -> Iterator[str]:
    """Say what each strategy becomes in this study, and what the preset's choices save.

    Savings are predicted for the first strategy at micro batch 1.
    """
    yield f"Preset {preset.name}: {preset.summary} ({preset.source})."
    for strategy in preset.strategies:
        yield "  " + strategy_words(strategy, preset, space, fixed)
    parameters, _ = place(preset.strategies[0], space)
    settings = settings_from(space, parameters, fixed)
    base = recipe_for(settings, pinned, Checkpointing.NON_REENTRANT, settings.effective_batch_size)

    def cost(recipe: StepRecipe, seq_len: int) -> tuple[MemoryEstimate, float]:
        changed = replace(settings, seq_len=seq_len)
        rate = speed(recipe, 1, changed, device, num_threads).tokens_per_s
        return estimate(recipe, 1, seq_len, device), rate

    here = cost(base, settings.seq_len)
    yield f"What its choices save here (predicted, strategy {preset.strategies[0].name}, micro batch 1):"
    without = cost(replace(base, checkpointing=Checkpointing.OFF), settings.seq_len)
    yield "  " + saving_words("activation checkpointing", here, without)
    if pinned.precision is Precision.FP32:
        kind = "a CPU computes in" if device.kind is DeviceKind.CPU else "the study is pinned to"
        yield f"  16-bit arithmetic: none, {kind} fp32."
    else:
        exact = cost(replace(base, precision=Precision.FP32), settings.seq_len)
        yield "  " + saving_words(f"16-bit arithmetic ({pinned.precision.value})", here, exact)
    for seq_len in sorted(other_lengths(space, settings)):
        yield "  " + saving_words(f"length {settings.seq_len:,}", here, cost(base, seq_len), f"{seq_len:,}")


def strategy_words(strategy: Strategy, preset: Preset, space: SearchSpace, fixed: FixedSettings) -> str:
    """Return a strategy in one line, with the steps that it takes here."""
    parameters, moved = place(strategy, space)
    settings = settings_from(space, parameters, fixed.of(preset.origin(strategy)))
    num_steps = max(1, settings.num_train_examples // settings.effective_batch_size)
    words = f"{strategy.name} ({strategy.summary}): {format_settings(all_values(parameters, space), {})}, "
    words += f"{num_steps:,} steps"
    if settings.num_train_examples != fixed.num_train_examples:
        words += f", {strategy.epochs:g} epochs: {settings.num_train_examples:,} examples"
        words += f" where other trials get {fixed.num_train_examples:,}"
    return words + (f"; changed: {', '.join(moved)}" if moved else "")


def all_values(parameters: Mapping[str, Value], space: SearchSpace) -> tuple[tuple[str, Value], ...]:
    """Return what a strategy sets, in the order of the space."""
    return tuple((name, parameters[name]) for name, _ in space.items if name in parameters)


def other_lengths(space: SearchSpace, settings: TrainingSettings) -> set[int]:
    """Return the other truncation lengths that the space holds."""
    values = getattr(space["seq_len"], "values", ())
    return {int(one) for one in values if one != settings.seq_len}


def saving_words(
    choice: str, here: tuple[MemoryEstimate, float], other: tuple[MemoryEstimate, float], instead: str = ""
) -> str:
    """Compare two costs, (memory, tokens/s): what a choice saves and what it costs in speed."""
    (ours, our_rate), (theirs, their_rate) = here, other
    saved = theirs.need.median_bytes - ours.need.median_bytes
    share = abs(saved) / max(1, theirs.need.median_bytes, ours.need.median_bytes)
    verb = "saves" if saved >= 0 else "costs"
    slower = 1 - our_rate / their_rate
    pace = "at the same speed"
    if abs(slower) >= 0.005:
        pace = f"{abs(slower):.0%} {'fewer' if slower > 0 else 'more'} tokens/s"
    words = f"{choice}: {gib(ours.need.median_bytes)} instead of {gib(theirs.need.median_bytes)}"
    if instead:
        words += f" at {instead}"
    return f"{words}, {verb} {share:.0%}, {pace}."
