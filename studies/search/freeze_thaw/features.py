"""Settings as the model sees them, and how fast it expects results to change with each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autosft.studies.search.dimensions import Choices, Dimension, Range, Value
from autosft.studies.search.freeze_thaw.gaussian_process import Prior, Priors

#: Settings that decide how far a step goes, in the place of which the model sees the run's mean rate.
_RATE, _BATCH, _WARMUP, _SCHEDULE = "learning_rate", "effective_batch_size", "warmup_ratio", "lr_scheduler"

#: Mean rate of a schedule after its warm-up, over its peak; others are near 0.5 or their own matter.
_MEAN_AFTER_WARMUP = {"constant": 1.0, "constant_with_warmup": 1.0, "inverse_sqrt": 0.7}

#: Decades of the mean rate within which results change: a bowl about one decade wide (Schulman et al. 2025).

_RATE_LENGTH = Prior(1.0, 0.6)
#: In ranges of the setting: most settings matter little over all of their range.
_OTHER_LENGTH = Prior(2.0, 0.8)
_CHOICE_LENGTH = Prior(2.0, 0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """How settings become numbers: the mean rate in decades, others over their range, choices as 0 or 1."""

    dimensions: tuple[tuple[str, Dimension], ...]

    @classmethod
    def over(cls, dimensions: Mapping[str, Dimension]) -> Features:
        return cls(dimensions=tuple(dimensions.items()))

    def of(self, parameters: Mapping[str, Value]) -> tuple[float, ...]:
        """Return the features of settings; one that does not apply to them is in the middle."""
        found: list[float] = []
        for name, dimension in self.dimensions:
            value = parameters.get(name)
            if name == _RATE:
                found.append(math.log10(mean_rate({**_middle(self.dimensions), **parameters})))
            elif isinstance(dimension, Choices) and not _is_ordered(dimension):
                # Distances between two choices are 1, whatever the number of choices.
                found += [math.sqrt(0.5) * (value == choice) for choice in dimension.values]
            else:
                found.append(_over_range(dimension, value))
        return tuple(found)

    def priors(self) -> Priors:
        lengths: list[Prior] = []
        for name, dimension in self.dimensions:
            if name == _RATE:
                lengths.append(_RATE_LENGTH)
            elif isinstance(dimension, Choices) and not _is_ordered(dimension):
                lengths += [_CHOICE_LENGTH] * len(dimension.values)
            else:
                lengths.append(_OTHER_LENGTH)
        return Priors(lengths=tuple(lengths))


def mean_rate(parameters: Mapping[str, Value]) -> float:
    """Return a run's mean learning rate over the square root of its batch.

    Schedules and warm-ups of the same mean rate learn alike; Adam's noise grows with the rate over the square
    root of the batch (Malladi et al. 2022).
    """
    warmup = float(parameters.get(_WARMUP, 0.0))
    after = _MEAN_AFTER_WARMUP.get(str(parameters.get(_SCHEDULE, "cosine")), 0.5)
    mean = float(parameters[_RATE]) * (warmup / 2 + (1 - warmup) * after)
    return mean / math.sqrt(float(parameters.get(_BATCH, 1)))


def _middle(dimensions: tuple[tuple[str, Dimension], ...]) -> dict[str, Value]:
    return {name: dimension.start() for name, dimension in dimensions}


def _is_ordered(dimension: Choices) -> bool:
    return all(isinstance(value, int | float) for value in dimension.values)


def _over_range(dimension: Dimension, value: Value | None) -> float:
    """Return where a number is between the ends of its dimension, 0..1, on its scale."""
    if isinstance(dimension, Range):
        low, high, is_log = dimension.low, dimension.high, dimension.log
    elif isinstance(dimension, Choices):
        numbers = sorted(float(each) for each in dimension.values)
        low, high, is_log = numbers[0], numbers[-1], numbers[0] > 0
    else:
        return 0.0
    if value is None or isinstance(value, str) or low == high:
        return 0.5
    if is_log:
        return math.log(float(value) / low) / math.log(high / low)
    return (float(value) - low) / (high - low)
