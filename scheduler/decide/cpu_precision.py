"""Whether a CPU trains in bf16 autocast by default: where it multiplies bf16 in hardware and gains by it."""

from __future__ import annotations

from dataclasses import replace

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.memory.host_kernels import is_known
from autosft.profiles.recipe import Checkpointing, Precision
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.planner import recipe_for
from autosft.studies.trial import PinnedSettings, TrainingSettings

#: Predicted speed over fp32's from which bf16 is taken: predictions are accurate to about 15 %.
WORTHWHILE = 1.2
#: Examples in the micro batch that is compared, at most.
MICRO_BATCH = 4


def in_bf16(pinned: PinnedSettings) -> PinnedSettings:
    """Return the same with fp32 weights and products in bf16."""
    return replace(pinned, precision=Precision.BF16_AUTOCAST)


def why_in_bf16(speedup: float) -> str:
    """Say why a CPU trains in bf16 autocast, and how not to."""
    return (
        f"{Precision.BF16_AUTOCAST.value}: this CPU multiplies bf16 in hardware, predicted to be "
        f"{speedup:.1f} times as fast as --precision {Precision.FP32.value}; losses end within "
        "0.3 % of its (docs/training.md)."
    )


def speedup_in_bf16(
    models: Models, settings: TrainingSettings, pinned: PinnedSettings, device: DeviceProfile
) -> float | None:
    """Return how many times as fast as in fp32 a CPU is predicted to train in bf16 autocast.

    None where fp32 stays the default: it is not pinned, the device is a GPU or lacks the instructions, the
    gain is too small, or the memory of a CPU's bf16 kernels is unknown.  Final losses over those of fp32:
    -0.01 % ± 0.02 %, at most 0.18 % in a run (`benchmarks/lean_losses.py`: three tasks, rates and seeds
    each), and +0.23 % in a LoRA run of SmolLM2-135M.

    Decided by the device's rates alone, not by what trials measured in one of the two: a study that is
    begun again decides the same.
    """
    is_choice = pinned.precision is Precision.FP32 and not device.kind.traits.trains_in_16_bit
    if not is_choice or not device.supports_bf16:
        return None
    micro_batch = min(MICRO_BATCH, settings.effective_batch_size)
    accumulation = max(1, settings.effective_batch_size // micro_batch)
    step_s = []
    for numerics in (pinned, in_bf16(pinned)):
        recipe = recipe_for(settings, numerics, Checkpointing.OFF, accumulation)
        if numerics is not pinned and not is_known(models.model, recipe):
            return None
        step = models.uncorrected_step(recipe, micro_batch, settings.seq_len, device, num_threads=1)
        step_s.append(step.step_s)
    ratio = step_s[0] / step_s[1]
    return ratio if ratio >= WORTHWHILE else None
