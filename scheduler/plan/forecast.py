"""The ways to run a method, and which of them is best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.recipe import (
    Checkpointing,
    MemoryEstimate,
    Method,
    Precision,
    Sharding,
    StepRecipe,
)
from autosft.profiles.speed.throughput import ThroughputEstimate
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.numerics import pin
from autosft.scheduler.decide.planner import (
    WORTHWHILE_SPEEDUP,
    is_known_to_fit,
    recipe_for,
    ways_to_run,
)
from autosft.scheduler.decide.search_space import default_batches
from autosft.scheduler.decide.sharing import at_most_at_once, threads_each, trials_on_cores
from autosft.studies.search.dimensions import Dimension
from autosft.studies.search.space import FixedSettings, default_parameters, default_space, settings_from
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings

#: CPU threads of a trial before it is known how many trials a CPU takes at once.
NUM_THREADS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the settings, with its predicted costs.

    micro_batch x gradient_accumulation x num_devices is the effective batch.
    """

    micro_batch: int
    gradient_accumulation: int
    checkpointing: Checkpointing
    sharding: Sharding
    num_devices: int
    memory: MemoryEstimate  # on each device
    tokens_per_s: float  # non-padding training tokens, over all devices
    run_s: float  # training, and evaluations if there are examples to evaluate on
    upper_run_s: float
    speed_basis: str  # origin of the rates: "measured rates", "datasheet rates", ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to run whose memory has not been predicted yet."""

    recipe: StepRecipe
    micro_batch: int
    speed: ThroughputEstimate


class Forecast:
    """All ways to run some settings, and their predicted costs."""

    def __init__(
        self,
        models: Models,
        *,
        padding_free: bool = False,
        num_threads: int = NUM_THREADS,
        precision: Precision | None = None,
    ) -> None:
        """`precision`: one that is asked for; None: what a study would pin."""
        self.models, self.model, self.padding_free = models, models.model, padding_free
        self.num_threads, self.precision = num_threads, precision

    def with_threads(self, num_threads: int) -> Forecast:
        """Return the same with another number of CPU threads for a trial."""
        return Forecast(
            self.models,
            padding_free=self.padding_free,
            num_threads=num_threads,
            precision=self.precision,
        )

    def in_precision(self, precision: Precision | None) -> Forecast:
        """Return the same for a precision that is asked for."""
        return Forecast(
            self.models,
            padding_free=self.padding_free,
            num_threads=self.num_threads,
            precision=precision,
        )

    def pinned(self, settings: TrainingSettings, device: DeviceProfile) -> PinnedSettings:
        """Return the numerics that a study of these settings would pin on a device."""
        return pin(
            settings,
            device,
            self.model.attention,
            padding_free=self.padding_free,
            precision=self.precision,
        )

    def settled(self, device: DeviceProfile, trial_bytes: int) -> Forecast:
        """Return the same with the threads that a study gives a trial of this size: fewer fit, more each."""
        if not device.kind.traits.is_split_by_cores:
            return self
        by_memory = usable_bytes(device) // max(1, trial_bytes)
        at_once = trials_on_cores(device.num_cores, by_memory=by_memory, at_most=at_most_at_once())
        num_threads = threads_each(device.num_cores, at_once)
        return self if num_threads == self.num_threads else self.with_threads(num_threads)

    def ways(self, settings: TrainingSettings, device: DeviceProfile, num_devices: int) -> list[Candidate]:
        """Return all ways to run on `num_devices`, fastest first; none if they do not divide the batch."""
        candidates = [
            Candidate(
                recipe=recipe,
                micro_batch=micro_batch,
                speed=self.models.step(recipe, micro_batch, settings.seq_len, device, self.num_threads),
            )
            for recipe, micro_batch in recipes(settings, self.pinned(settings, device), num_devices)
        ]
        return sorted(
            candidates, key=lambda candidate: (-candidate.speed.tokens_per_s, candidate.micro_batch)
        )

    def weigh(self, candidate: Candidate, settings: TrainingSettings, device: DeviceProfile) -> Way:
        """Predict the memory of a way to run."""
        recipe, micro_batch = candidate.recipe, candidate.micro_batch
        run_s = self.models.speed(recipe, micro_batch, settings, device, self.num_threads).run_s
        return Way(
            micro_batch=micro_batch,
            gradient_accumulation=recipe.gradient_accumulation,
            checkpointing=recipe.checkpointing,
            sharding=recipe.sharding,
            num_devices=recipe.data_parallel,
            memory=self.models.estimate(recipe, micro_batch, settings.seq_len, device),
            tokens_per_s=candidate.speed.tokens_per_s,
            run_s=run_s,
            upper_run_s=run_s * candidate.speed.upper_step_s / candidate.speed.step_s,
            speed_basis=candidate.speed.basis,
        )

    def weigh_plan(self, made: ExecutionPlan, settings: TrainingSettings, device: DeviceProfile) -> Way:
        """Return a plan on one device as a way to run."""
        pinned = self.pinned(settings, device)
        recipe = recipe_for(settings, pinned, made.checkpointing, made.gradient_accumulation)
        step = self.models.step(recipe, made.micro_batch, settings.seq_len, device, self.num_threads)
        way = self.weigh(Candidate(recipe=recipe, micro_batch=made.micro_batch, speed=step), settings, device)
        return replace(way, memory=made.estimate)


def default_settings(
    method: Method,
    model: ModelProfile,
    *,
    seq_len: int,
    effective_batch_size: int | None,
    num_train_examples: int,
    adapter: str = "lora",
    overrides: Mapping[str, Dimension] | None = None,
) -> TrainingSettings:
    """Return the settings that a study would start from; its default effective batch if none is given.

    `overrides`: what is fixed of them, such as LoRA's rank.
    """
    space = default_space(
        method=method,
        num_parameters=model.num_parameters,
        num_train_examples=num_train_examples,
        seq_lens=[seq_len],
        effective_batch_sizes=default_batches(num_train_examples)
        if effective_batch_size is None
        else [effective_batch_size],
        overrides=overrides,
    )
    fixed = FixedSettings(num_train_examples=num_train_examples, seed=0, adapter=adapter)
    return settings_from(space, default_parameters(space), fixed)


def recipes(
    settings: TrainingSettings, pinned: PinnedSettings, num_devices: int
) -> Iterator[tuple[StepRecipe, int]]:
    """Yield all (recipe, micro batch) on `num_devices`: replicas or shards, if there are several."""
    if settings.effective_batch_size % num_devices:
        return
    yield from ways_to_run(settings, pinned, num_devices)


def fits(way: Way, device: DeviceProfile) -> bool:
    """Whether a way fits a device: its upper bound is free, and it was traced entirely."""
    return is_known_to_fit(way.memory, usable_bytes(device))


def preferred_fitting(
    settings: TrainingSettings, device: DeviceProfile, num_devices: int, forecast: Forecast
) -> Way | None:
    """Return the way that the planner would choose on `num_devices`, None if none fits.

    That is the smallest of those that are nearly as fast as the fastest, with the threads that a study would
    give a trial.
    """
    found = preferred_with_threads(settings, device, num_devices, forecast)
    if found is None or num_devices > 1:
        return found
    settled = forecast.settled(device, found.memory.total_bytes)
    return found if settled is forecast else preferred_with_threads(settings, device, 1, settled)


def preferred_with_threads(
    settings: TrainingSettings, device: DeviceProfile, num_devices: int, forecast: Forecast
) -> Way | None:
    """Return the same with the forecast's number of threads."""
    candidates = forecast.ways(settings, device, num_devices)
    for sharding in Sharding:
        alike = [candidate for candidate in candidates if candidate.recipe.sharding is sharding]
        if alike and not fits(smallest_way(alike, settings, device, forecast), device):
            candidates = [candidate for candidate in candidates if candidate not in alike]
    fitting: list[Way] = []
    for candidate in candidates:
        if fitting and candidate.speed.tokens_per_s * WORTHWHILE_SPEEDUP < fitting[0].tokens_per_s:
            break
        way = forecast.weigh(candidate, settings, device)
        if fits(way, device):
            fitting.append(way)
    return min(fitting, key=lambda way: (way.memory.total_bytes, way.micro_batch), default=None)


def smallest_way(
    candidates: Sequence[Candidate], settings: TrainingSettings, device: DeviceProfile, forecast: Forecast
) -> Way:
    """Return the way with the lowest memory among those with the same sharding.

    That is one example at a time with checkpointing or, if parameters outweigh activations, the entire batch
    at once: accumulated gradients coexist with the next forward pass.
    """
    spared = [
        candidate for candidate in candidates if candidate.recipe.checkpointing is not Checkpointing.OFF
    ] or candidates
    by_size = sorted(spared, key=lambda candidate: candidate.micro_batch)
    ends = (forecast.weigh(candidate, settings, device) for candidate in (by_size[0], by_size[-1]))
    return min(ends, key=lambda way: way.memory.total_bytes)
