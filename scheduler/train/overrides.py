"""The user's overrides of a configuration, and this machine's names of its inputs."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from autosft.profiles.dataset.sources import in_full
from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Precision
from autosft.profiles.sources import full_path
from autosft.studies.export import ExportedConfig
from autosft.studies.metrics import METRICS
from autosft.studies.trial import TrainingSettings


class LearningRateScaling(enum.Enum):
    """How the learning rate is scaled with the effective batch."""

    LINEAR = "linear"  #: in proportion (Goyal et al. 2017, for SGD)
    SQRT = "sqrt"  #: with the square root (Malladi et al. 2022, for Adam)
    NONE = "none"  #: not at all

    def factor(self, batch_ratio: float) -> float:
        return {"linear": batch_ratio, "sqrt": math.sqrt(batch_ratio), "none": 1.0}[self.value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What this machine calls by another name, and what the user wants changed."""

    model: str | None = None  # where the model is on this machine
    data: str | None = None  # where the data is on this machine
    eval_data: str | None = None
    prompts: str | None = None  # where the metric's prompts are on this machine; "none" skips them
    precision: Precision | None = None
    optimizer: str | None = None  # of a lean way to hold what is trained, with its precision
    effective_batch_size: int | None = None
    scale_lr: LearningRateScaling = LearningRateScaling.NONE  # if the effective batch changes
    trust_remote_code: bool = False


NO_OVERRIDES = Overrides()


def with_overrides(config: ExportedConfig, overrides: Overrides) -> ExportedConfig:
    """Return the configuration with the user's overrides, and with this machine's names of model and data."""
    options = dict(config.data.options or {})
    if overrides.eval_data is not None:
        options["eval_data"] = in_full(overrides.eval_data)
    prompts = config.prompts
    if overrides.prompts is not None:
        if prompts is None:
            flags = " or ".join(row.data_flag for row in METRICS.values() if row.benchmark)
            raise UserError(
                f"{flags} {overrides.prompts}: this configuration was compared by "
                f"{config.expected.metric}, which uses no prompts.",
                remedy="Leave it out, and score the trained model with autosft evaluate.",
            )
        prompts = replace(prompts, source=full_path(overrides.prompts))
    settings = with_batch(config.settings, overrides.effective_batch_size, overrides.scale_lr)
    return replace(
        config,
        prompts=prompts,
        model=replace(config.model, name=full_path(overrides.model or config.model.name)),
        data=replace(config.data, source=in_full(overrides.data or config.data.source), options=options),
        settings=replace(settings, optimizer=overrides.optimizer or settings.optimizer),
    )


def with_batch(
    settings: TrainingSettings, effective_batch_size: int | None, scaling: LearningRateScaling
) -> TrainingSettings:
    """Return the settings with another effective batch, over the same examples.  Raises UserError."""
    if effective_batch_size is None:
        if scaling is not LearningRateScaling.NONE:
            raise UserError(
                f"--scale-lr {scaling.value} without --effective-batch-size has nothing to scale with.",
                remedy="Give the new effective batch with --effective-batch-size N.",
            )
        return settings
    if not 1 <= effective_batch_size <= settings.num_train_examples:
        raise UserError(
            f"--effective-batch-size {effective_batch_size} is not between 1 and the "
            f"{settings.num_train_examples:,} examples of the run."
        )
    factor = scaling.factor(effective_batch_size / settings.effective_batch_size)
    return replace(
        settings,
        effective_batch_size=effective_batch_size,
        learning_rate=float(f"{settings.learning_rate * factor:.6g}"),
    )
