"""The search space of a study, clipped to what its devices and data permit."""

from __future__ import annotations

import math

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapters import unused_settings
from autosft.profiles.recipe import Method
from autosft.studies.request import TuneRequest
from autosft.studies.search.dimensions import Choices, Dimension, Fixed, Range
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.search.presets import preset
from autosft.studies.search.settings import SETTINGS
from autosft.studies.search.space import FixedSettings, SearchSpace, default_space

#: Effective batch sizes that a study searches by default.
EFFECTIVE_BATCH_SIZES = (8, 16, 32, 64)
#: Minimum number of optimizer steps in a full run; fewer make a schedule meaningless.
MIN_STEPS = 10


def study_space(
    request: TuneRequest,
    *,
    method: Method,
    num_parameters: int,
    num_examples: int,
    longest: int,
    default_seq_len: int,
    devices_per_trial: int,
) -> SearchSpace:
    """Return the space that a study searches: the request's dimensions, and defaults for the rest.

    `num_examples` is the number of examples in a full run, `longest` the maximum sequence length of model and
    data in tokens, and `default_seq_len` the truncation length if none is given.  Raises UserError for
    lengths and batches beyond these.
    """
    overrides = within_reach(request, longest=longest, num_examples=num_examples)
    # Settings that the adapter does not take are not searched.
    overrides |= {
        name: Fixed(value=unused)
        for name in unused_settings(request.adapter)
        if (unused := SETTINGS[name].unused) is not None
    }
    asked_batch = overrides.get("effective_batch_size")
    asked_len = overrides.get("seq_len")
    return default_space(
        method=method,
        num_parameters=num_parameters,
        num_train_examples=num_examples,
        seq_lens=[default_seq_len] if asked_len is None else lengths_of(asked_len, longest),
        effective_batch_sizes=default_batches(num_examples, devices_per_trial)
        if asked_batch is None
        else batches_of(asked_batch, num_examples),
        overrides=overrides,
    )


def fixed_settings(request: TuneRequest, *, num_available: int) -> FixedSettings:
    """Return what all trials have in common; `num_available` is the number of training examples."""
    num_usable = min(num_available, request.max_train_samples or num_available)
    return FixedSettings(
        num_train_examples=max(1, round(request.epochs * num_usable)),
        seed=request.seed,
        max_train_samples=request.max_train_samples,
        examples_of=examples_of_strategies(request, num_usable),
        adapter=request.adapter,
    )


def within_reach(request: TuneRequest, *, longest: int, num_examples: int) -> dict[str, Dimension]:
    """Return the request's dimensions; those that only a preset sets are clipped to model and data."""
    given = request.dimensions()
    limits = {"seq_len": longest, "effective_batch_size": num_examples}
    for name, limit in limits.items():
        values = preset(request.preset).request.get(name) if request.preset else None
        if values is not None and given[name] == parse_dimension(name, values):
            given[name] = parse_dimension(name, sorted({min(int(value), limit) for value in values}))
    return given


def examples_of_strategies(request: TuneRequest, num_usable: int) -> tuple[tuple[str, int], ...]:
    """Return (origin, examples in a full run) of a preset's strategies that set their own epochs."""
    if request.preset is None:
        return ()
    chosen = preset(request.preset)
    epochs = {
        chosen.origin(strategy): chosen.epochs_of(strategy, request.epochs) for strategy in chosen.strategies
    }
    return tuple(
        (origin, max(1, round(number * num_usable)))
        for origin, number in epochs.items()
        if number != request.epochs
    )


def default_batches(num_examples: int, num_devices: int = 1) -> list[int]:
    """Return the effective batch sizes that are searched by default, smallest first.

    Only those that a gang of devices can divide, if there are any.
    """
    enough = [size for size in EFFECTIVE_BATCH_SIZES if num_examples // size >= MIN_STEPS]
    enough = enough or [2 ** max(0, (num_examples // MIN_STEPS).bit_length() - 1)]  # 4 where 7 would do
    return [item for item in enough if item % num_devices == 0] or enough


def lengths_of(dimension: object, longest: int) -> list[int]:
    """Return the truncation lengths that a dimension permits, none above the model's maximum."""
    return values_of(dimension, what="seq_len", limit=longest, limit_name="the model's longest position")


def batches_of(dimension: object, num_examples: int) -> list[int]:
    return values_of(
        dimension, what="effective_batch_size", limit=num_examples, limit_name="the examples of a whole run"
    )


def values_of(dimension: object, *, what: str, limit: int, limit_name: str) -> list[int]:
    """Return the whole numbers of a dimension (powers of two within a range).  Raises UserError."""
    match dimension:
        case Fixed(value=value):
            numbers = [int(value)]
        case Choices(values=values):
            numbers = [int(value) for value in values]
        case Range(low=low, high=high):
            powers = [2**k for k in range(31) if low <= 2**k <= high]
            numbers = sorted({math.ceil(low), *powers, math.floor(high)})
        case _:
            raise AssertionError(dimension)
    if max(numbers) > limit:
        raise UserError(
            f"--{what.replace('_', '-')} {max(numbers)} is above {limit}, {limit_name}.",
            remedy=f"Use at most {limit}.",
        )
    return numbers
