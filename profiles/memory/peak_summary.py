"""Summarize the peak of a run for users: bytes by phase and by owner, and what would lower it."""

from __future__ import annotations

from collections.abc import Mapping

from autosft.profiles.memory.program.blocks import Owner, Phase
from autosft.profiles.memory.program.run import Peak, Run
from autosft.profiles.recipe import StepRecipe
from autosft.profiles.units import gib

#: What the phases of a program are called in estimates.
PHASE_NAMES = {
    Phase.SETUP: "forward",
    Phase.INPUT: "forward",
    Phase.FORWARD: "forward",
    Phase.HEAD: "forward",
    Phase.LOSS_BACKWARD: "loss backward",
    Phase.LAYER_BACKWARD: "layer backward",
    Phase.OPTIMIZER: "optimizer",
    Phase.EVALUATION: "evaluation",
    Phase.GENERATION: "generation",
}


#: What lowers the memory of each owner.
_REMEDIES = {
    Owner.PARAMETER: "QLoRA or sharding over more devices lowers them",
    Owner.GRADIENT: "LoRA or sharding over more devices lowers them",
    Owner.OPTIMIZER_STATE: "--memory lean, LoRA or a paged optimizer lowers it",
    Owner.ACTIVATION: "a smaller micro batch, a shorter length or activation checkpointing lowers them",
    Owner.LOGITS: "a smaller micro batch or a shorter length lowers them",
    Owner.INPUT: "a smaller micro batch lowers them",
    Owner.WORKSPACE: "it does not depend on the plan",
}


def phases(run: Run, beside_bytes: int, ratio: float) -> tuple[tuple[str, int], ...]:
    """Return the peak bytes of each phase, in order; `beside_bytes` are added, and all scaled by `ratio`."""
    peaks = run.peak_by_phase()
    names = dict.fromkeys(PHASE_NAMES.values())
    by_name = {
        name: [peaks[phase] for phase, same in PHASE_NAMES.items() if same == name and phase in peaks]
        for name in names
    }
    return tuple((name, int((max(sizes) + beside_bytes) * ratio)) for name, sizes in by_name.items() if sizes)


def components(by_owner: Mapping[Owner, int], total: int) -> tuple[tuple[str, int], ...]:
    """Return bytes by owner, adding up to `total`: the largest absorbs what calibration changes."""
    parts = {owner.value: max(0, size) for owner, size in by_owner.items()}
    largest = max(parts, key=lambda name: parts[name])
    parts[largest] += total - sum(parts.values())
    return tuple(parts.items())


def describe_owner(peak: Peak, by_owner: Mapping[Owner, int], recipe: StepRecipe) -> str:
    """Describe for users what owns most of the peak, and what would lower it."""
    owner = max(by_owner, key=lambda item: by_owner[item])
    size = gib(by_owner[owner])
    if peak.phase is Phase.GENERATION and owner is Owner.ACTIVATION:
        return f"the key-value cache of one answer, {size}; shorter answers lower it"
    head = [size for birth, size in peak.largest if birth.owner is Owner.LOGITS]
    if peak.phase is Phase.LOSS_BACKWARD and head and recipe.adapter is None:
        return (
            f"the head's fp32 weight gradient, {gib(head[0])}, on top of the {owner.value}, {size}; "
            "LoRA without the head avoids it"
        )
    return f"the {owner.value}, {size}; {_REMEDIES[owner]}"
