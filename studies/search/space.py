"""Search spaces: which settings of a study are searched, over which values, and where the search starts.

A dimension is a range, a list of choices, or fixed.  Everything here is a pure function over frozen values;
the sampler that draws from a space is in `autosft.studies.search.sampling`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from autosft.profiles.errors import UserError
from autosft.profiles.model.adapters import chosen
from autosft.profiles.recipe import AdapterSettings, Method
from autosft.studies.search.dimensions import Choices, Dimension, Fixed, Range, Value
from autosft.studies.search.settings import SETTINGS, Kind, find_setting
from autosft.studies.trial import TrainingSettings

Parameters = Mapping[str, Value]

ADAPTER_METHODS = frozenset({Method.LORA.value, Method.QLORA.value})

#: Maximum number of choices: the training data is tokenized once for each number of rounds.
MAX_ROUND_CHOICES = 16


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What a study varies: one dimension per row of `settings.SETTINGS`, in their order.

    `max_rounds` 0 means whole conversations.  If fixed, it decides how all data is prepared, including what
    is evaluated; if searched, it affects training only.  The settings of adapters apply only if the method is
    LoRA or QLoRA.  `lora_targets` is peft's "all-linear" or module name suffixes joined by commas; alpha is
    `lora_alpha_ratio` x rank.
    """

    items: tuple[tuple[str, Dimension], ...]

    #: Written as a mapping of names to dimensions (`wire`).
    MAPPED: ClassVar[Any] = Dimension

    @classmethod
    def from_mapping(cls, dimensions: Mapping[str, Dimension]) -> SearchSpace:
        """Return the space with these dimensions; a missing setting gets its value from before it existed.

        Raises ValueError for an unknown setting, and for a missing one that every space has.
        """
        if unknown := dimensions.keys() - SETTINGS.keys():
            raise ValueError(f"unknown setting {sorted(unknown)[0]!r}")
        found = {name: dimensions.get(name, row.absent) for name, row in SETTINGS.items()}
        if lacking := [name for name, dimension in found.items() if dimension is None]:
            raise ValueError(f"the setting {lacking[0]!r} is missing")
        return cls(tuple((name, each) for name, each in found.items() if each is not None))

    def as_mapping(self) -> dict[str, Dimension]:
        """Return the dimension of each setting."""
        return dict(self.items)

    def __getitem__(self, name: str) -> Dimension:
        return self.as_mapping()[name]

    def changed(self, **dimensions: Dimension) -> SearchSpace:
        """Return a copy with other dimensions for some settings."""
        return SearchSpace.from_mapping({**self.as_mapping(), **dimensions})

    def searched(self) -> dict[str, Dimension]:
        """Return the dimensions that a sampler has to choose, in the order of the settings."""
        methods = self.methods()
        return {
            name: dimension
            for name, dimension in self.items
            if not isinstance(dimension, Fixed)
            and (not SETTINGS[name].of_adapters or methods & ADAPTER_METHODS)
        }

    def methods(self) -> frozenset[str]:
        method = self["method"]
        values = method.values if isinstance(method, Choices) else (method.start(),)
        return frozenset(str(value) for value in values)

    @property
    def is_conditional(self) -> bool:
        """Whether some searched dimension applies to some of the methods only."""
        has_lora = any(SETTINGS[name].of_adapters for name in self.searched())
        return has_lora and not self.methods() <= ADAPTER_METHODS

    def clip(self, *, max_seq_len: int | None = None, max_effective_batch: int | None = None) -> SearchSpace:
        """Remove what does not fit the devices, so that no trial is spent on it.

        Raises UserError if nothing is left.
        """
        limits = {"seq_len": max_seq_len, "effective_batch_size": max_effective_batch}
        return self.changed(
            **{name: _at_most(name, self[name], limit) for name, limit in limits.items() if limit is not None}
        )


def _at_most(name: str, dimension: Dimension, limit: int) -> Dimension:
    if isinstance(dimension, Range) and dimension.low <= limit:
        return dataclasses.replace(dimension, high=min(dimension.high, limit))
    values = dimension.values if isinstance(dimension, Choices) else (dimension.start(),)
    kept = tuple(value for value in values if not isinstance(value, str) and value <= limit)
    if isinstance(dimension, Range) or not kept:
        raise UserError(
            f"{name}: {dimension} is not possible; at most {limit} fits the devices.",
            remedy=f"Choose {name} of at most {limit}, or devices with more memory.",
        )
    if isinstance(dimension, Fixed):
        return dimension
    start = dimension.start()
    return Choices(values=kept, default=start if start in kept else kept[-1])


# --- the default space and where it starts --------------------------------------------------------


#: LoRA's first learning rate, whatever the size of the model, at the default rank of 16 and alpha over rank
#: of 2 (alpha 32).  On 23 models from 1B to 1T at an effective batch of 128 it loses 0.24 % of NLL on average
#: to each model's best; 2e-4 x sqrt(7e9 / parameters) loses 1.2 % (`benchmarks/search.py --rules`; Thinking
#: Machines' tinker-cookbook, sft_sweep; alpha 32: Schulman et al. 2025, "LoRA Without Regret").
LORA_LEARNING_RATE = 3e-4


def rule_learning_rate(*, method: Method, num_parameters: int) -> float:
    """Return the learning rate to start from: LORA_LEARNING_RATE, or by size in full fine-tuning.

    Full fine-tuning: 2e-5 x sqrt(7e9 / parameters), never above 5e-3.  Anchored at 2e-5 for 7 billion
    parameters (supervised fine-tuning of Llama 2: Touvron et al. 2023, section 3.1; Stanford Alpaca, 2023)
    and 1.4e-4 for 135 million, between the 4e-5 to 1e-3 in use there (Hugging Face's alignment-handbook has
    1e-3 for SmolLM2 135M and 360M, 3e-4 for 1.7B, at effective batches of 128).  A starting point, not an
    answer: the space around it spans two decades.
    """
    if method.value in ADAPTER_METHODS:
        return LORA_LEARNING_RATE
    return float(f"{min(2e-5 * math.sqrt(7e9 / num_parameters), 5e-3):.2g}")


def earlier_learning_rates(*, num_parameters: int) -> Range:
    """Return LoRA's learning rates in studies from before LORA_LEARNING_RATE: ten times those of full."""
    rate = float(f"{min(2e-4 * math.sqrt(7e9 / num_parameters), 5e-3):.2g}")
    low, high = float(f"{rate / 10:.2g}"), float(f"{rate * 10:.2g}")
    return Range(low=low, high=high, log=True, default=rate)


def default_space(
    *,
    method: Method,
    num_parameters: int,
    num_train_examples: int,
    seq_lens: Sequence[int],
    effective_batch_sizes: Sequence[int],
    overrides: Mapping[str, Dimension] | None = None,
) -> SearchSpace:
    """Return the space that a study searches unless its user says otherwise.

    `num_train_examples` is the number of examples in a full run.  `seq_lens` are the lengths to choose from
    (a single one if truncation is not at stake), `effective_batch_sizes` those that every permitted gang of
    devices can divide; a range that the user gives for either is narrowed to them.  `overrides` are the
    user's own dimensions (`parse_dimension`); the search then starts at their value nearest to the rule's.

    Raises UserError if an override leaves nothing to choose.
    """
    assert seq_lens
    assert effective_batch_sizes
    assert num_parameters > 0
    overrides = dict(overrides or {})
    for name in overrides:
        find_setting(name)
    lowest, highest = _learning_rates(overrides.get("method", Fixed(value=method.value)), num_parameters)
    start = rule_learning_rate(method=method, num_parameters=num_parameters)
    dimensions: dict[str, Dimension] = {
        **{name: row.default for name, row in SETTINGS.items() if row.default is not None},
        "learning_rate": Range(low=lowest, high=highest, log=True, default=start),
        "effective_batch_size": _batch_choices(effective_batch_sizes, num_train_examples),
        "seq_len": _one_or_choices(sorted(set(seq_lens)), start=max(seq_lens)),
        "method": Fixed(value=method.value),
    }
    if (given := overrides.pop("max_rounds", None)) is not None:
        rounds = rounds_of(given)
        dimensions["max_rounds"] = _one_or_choices(rounds, start=rounds[-1])
    allowed = {"effective_batch_size": effective_batch_sizes, "seq_len": seq_lens}
    for name, given in overrides.items():
        narrowed = _among(name, given, allowed[name]) if name in allowed else given
        dimensions[name] = _starting_near(narrowed, dimensions[name].start())
    return SearchSpace.from_mapping(dimensions)


def rounds_of(dimension: Dimension) -> tuple[int, ...]:
    """Return the numbers of rounds that a dimension permits, ascending.  Raises UserError for too many."""
    match dimension:
        case Range(low=low, high=high):
            values = sorted({round(dimension.nearest(each)) for each in range(int(low), int(high) + 1)})
        case Choices(values=choices):
            values = sorted(int(each) for each in choices)
        case Fixed(value=value):
            values = [int(value)]
    if len(values) > MAX_ROUND_CHOICES:
        raise UserError(
            f"max_rounds: {dimension} has {len(values)} values, and the data is prepared once for each.",
            remedy=f'Give at most {MAX_ROUND_CHOICES}, such as "4, 6, 8".',
        )
    return tuple(values)


def _learning_rates(method: Dimension, num_parameters: int) -> tuple[float, float]:
    """Return one decade either side of the rule, over all methods that may be chosen."""
    values = method.values if isinstance(method, Choices) else (method.start(),)
    rules = [rule_learning_rate(method=Method(value), num_parameters=num_parameters) for value in values]
    return float(f"{min(rules) / 10:.2g}"), float(f"{max(rules) * 10:.2g}")


def _batch_choices(allowed: Sequence[int], num_train_examples: int) -> Dimension:
    """Return three neighbouring batch sizes around the rule: 64, but at least 100 optimizer steps in a run.

    64 is Llama 2's for supervised fine-tuning (Touvron et al. 2023, section 3.1).
    """
    sizes = sorted(set(allowed))
    start = max((size for size in sizes if size <= min(64, num_train_examples / 100)), default=sizes[0])
    at = sizes.index(start)
    return _one_or_choices(sizes[max(0, at - 1) : at + 2], start=start)


def _one_or_choices(values: Sequence[int], *, start: int) -> Dimension:
    return Fixed(value=values[0]) if len(values) == 1 else Choices(values=tuple(values), default=start)


def _among(name: str, given: Dimension, allowed: Sequence[int]) -> Dimension:
    """Narrow what the user asked for to what the devices can do; a single impossible value is refused."""
    sizes = sorted(set(allowed))
    if isinstance(given, Range):
        kept: tuple[Value, ...] = tuple(size for size in sizes if given.low <= size <= given.high)
    else:
        values = given.values if isinstance(given, Choices) else (given.value,)
        kept = tuple(value for value in values if name == "seq_len" or value in sizes)
        if len(kept) < len(values):  # choices were listed explicitly: dropping one would be silent
            kept = ()
    if not kept:
        raise UserError(
            f"{name}: {given} is not possible on the devices.",
            remedy=f"Possible: {', '.join(str(size) for size in sizes)}.",
        )
    return Fixed(value=kept[0]) if len(kept) == 1 else Choices(values=kept)


def _starting_near(dimension: Dimension, start: Value) -> Dimension:
    if isinstance(dimension, Fixed) or dimension.default is not None:
        return dimension
    if isinstance(dimension, Choices):
        return dataclasses.replace(dimension, default=dimension.nearest(start))
    return dimension if isinstance(start, str) else dataclasses.replace(dimension, default=start)


# --- parameters: values for the searched dimensions -----------------------------------------------


def active(space: SearchSpace, parameters: Parameters) -> dict[str, Dimension]:
    """Return the searched dimensions that apply, given the method in `parameters` or the fixed one."""
    method = parameters.get("method", space["method"].start())
    return {
        name: dimension
        for name, dimension in space.searched().items()
        if not SETTINGS[name].of_adapters or method in ADAPTER_METHODS
    }


def default_parameters(space: SearchSpace) -> dict[str, Value]:
    """Return the rule-based configuration, a study's first trial, for the searched dimensions."""
    return complete(space, {})


def complete(space: SearchSpace, parameters: Parameters) -> dict[str, Value]:
    """Complete `parameters` with the values where the search starts.

    Raises UserError for an unknown name, for a value outside the space, and for one that contradicts a fixed
    value of the space.
    """
    for name, value in parameters.items():
        find_setting(name)
        dimension = space[name]
        if value not in dimension:
            raise UserError(
                f"{name}: {value} is outside the study's search space ({dimension}).",
                remedy="Choose a value inside it, or widen the space in a new study.",
            )
    names = active(space, parameters)
    filled = {name: parameters.get(name, dimension.start()) for name, dimension in names.items()}
    return {name: int(value) if SETTINGS[name].is_whole else value for name, value in filled.items()}


def neighbours(space: SearchSpace, parameters: Parameters) -> tuple[dict[str, Value], ...]:
    """Return the next configurations to try around `parameters`: learning rate x3 and /3.

    Clipped to the space; duplicates are left out.
    """
    dimension = space.searched().get("learning_rate")
    if dimension is None:
        return ()
    here = float(parameters["learning_rate"])
    rates = [float(dimension.nearest(float(f"{rate:.2g}"))) for rate in (here * 3, here / 3)]
    return tuple(
        {**parameters, "learning_rate": rate}
        for rate in dict.fromkeys(rates)
        if not math.isclose(rate, here, rel_tol=0.05)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSettings:
    """What all trials of a study have in common and no dimension covers."""

    num_train_examples: int
    seed: int = 0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_train_samples: int | None = None
    adapter: str = "lora"  # parsed by `profiles.model.adapters.chosen`
    examples_of: tuple[
        tuple[str, int], ...
    ] = ()  # (origin, examples) of trials with another number of examples

    def of(self, origin: str) -> FixedSettings:
        """Return the fixed settings for trials of an origin, such as a preset's strategy with more epochs."""
        return replace(self, num_train_examples=dict(self.examples_of).get(origin, self.num_train_examples))


def settings_from(space: SearchSpace, parameters: Parameters, fixed: FixedSettings) -> TrainingSettings:
    """Return the training settings that `parameters` denote in `space`."""
    given = {**{name: dimension.start() for name, dimension in space.items}, **parameters}
    values: dict[str, Any] = {name: _typed(name, value) for name, value in given.items()}
    method = Method(values["method"])
    targets = str(values["lora_targets"])
    adapter = AdapterSettings(
        rank=values["lora_rank"],
        alpha=float(values["lora_alpha_ratio"]) * values["lora_rank"],
        targets=targets if targets == "all-linear" else tuple(name.strip() for name in targets.split(",")),
        **chosen(fixed.adapter),
    )
    if isinstance(space["max_rounds"], Fixed):
        values["max_rounds"] = None  # the prepared data is cut already
    names = {field.name for field in dataclasses.fields(TrainingSettings)}
    same = {field.name: getattr(fixed, field.name) for field in dataclasses.fields(fixed)}
    found = {name: value for name, value in {**same, **values}.items() if name in names}
    return TrainingSettings(
        **{**found, "method": method, "adapter": adapter if method.value in ADAPTER_METHODS else None}
    )


def _typed(name: str, value: Value | None) -> Value | None:
    """Convert a value to its setting's type: a whole number to int, another number to float."""
    kind = SETTINGS[name].kind
    if value is None or kind is Kind.TEXT:
        return value
    return int(value) if kind is Kind.WHOLE_NUMBER else float(value)
