"""Say what a training step needs: the one question that plans ask of the memory model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from autosft.profiles.hardware import DeviceProfile
from autosft.profiles.memory.closed_form import closed_form
from autosft.profiles.recipe import LengthProfile, MemoryEstimate, StepRecipe


class ModelConfig(Protocol):
    """What the memory model has to know of a model: its transformers configuration."""

    @property
    def config_json(self) -> str: ...

    @property
    def trust_remote_code(self) -> bool: ...


def estimate(
    model: ModelConfig | str,
    recipe: StepRecipe,
    micro_batch: int,
    lengths: LengthProfile,
    device: DeviceProfile,
    *,
    calibration: Any = None,
    cache_dir: Path | None = None,
    seed: int = 0,
) -> MemoryEstimate:
    """Predict the peak memory of training with `recipe`, `micro_batch` examples at a time.

    `model` is the configuration in transformers' JSON, or something that has it as `config_json`.
    """
    config_json = model if isinstance(model, str) else model.config_json
    return closed_form(
        config_json, recipe, micro_batch, lengths, device.kind, outside_bytes=device.context_bytes
    )
