"""What `autosft plan` shows: how each method would run on a device, and what would fit where it does not.

Pure over the memory and speed models; nothing is trained or loaded.  A way to run is named by what the
planner varies; its memory is asked for only where that decides something, since it costs a replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile, usable_bytes
from autosft.profiles.hardware.known_devices import cluster_from_name, known_devices
from autosft.profiles.model.profile import ModelProfile
from autosft.profiles.recipe import (
    Checkpointing,
    MemoryEstimate,
    Method,
    Precision,
    Sharding,
    StepRecipe,
)
from autosft.profiles.speed.step_work import num_trained, saved_bytes
from autosft.profiles.speed.throughput import ThroughputEstimate
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.numerics import pin
from autosft.scheduler.decide.planner import WORTHWHILE_SPEEDUP, ways_to_run
from autosft.scheduler.decide.search_space import default_batches
from autosft.studies.space import FixedSettings, default_parameters, default_space, settings_from
from autosft.studies.trial import TrainingSettings

#: Numbers of devices that are compared.
NUMS_DEVICES = (1, 2, 4)
#: CPU threads of a trial, as a study plans them: cores are cheaper apart than together.
NUM_THREADS = 1
#: Where nothing fits, so many devices may be proposed.
MORE_DEVICES = (2, 4, 8)
SHORTEST_SEQ_LEN = 64
EIGHT_BIT_OPTIMIZER = "adamw_8bit"
#: What a change usually costs of the result: Dettmers et al. 2022 (8-bit optimizers) and 2023 (QLoRA);
#: Biderman et al. 2024 (LoRA learns less and forgets less).
QUALITY = {
    "8-bit": "none measurable",
    "lora": "little on instructions, more on code, maths and new knowledge",
    "qlora": "as LoRA; 4 bits add nothing measurable",
    "shorter": "what is cut off is not learned",
    "same": "none",
}
#: What to try instead of a method that does not fit.
SMALLER_METHODS = {
    Method.FULL: (Method.LORA, Method.QLORA),
    Method.SPARSE: (Method.LORA, Method.QLORA),
    Method.LORA: (Method.QLORA,),
    Method.QLORA: (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the settings, with what it is predicted to cost.

    micro_batch x gradient_accumulation x num_devices is the effective batch.
    """

    micro_batch: int
    gradient_accumulation: int
    checkpointing: Checkpointing
    sharding: Sharding
    num_devices: int
    memory: MemoryEstimate  # on each device
    tokens_per_s: float  # non-padding training tokens, of all devices
    run_s: float  # training, and evaluations where there are examples to evaluate on
    upper_run_s: float
    speed_basis: str  # where the rates come from: "measured rates", "datasheet rates", ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change that would fit, and how it would run then."""

    change: str  # a flag, or what is needed in words
    device: str
    way: Way
    quality: str  # what it usually costs of the result, in words
    fields: Mapping[str, Any] | None  # of a TuneRequest that asks for it; None: needs another machine


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodPlan:
    """What one method can do on a device."""

    settings: TrainingSettings
    precision: Precision
    num_trained: int
    num_total: int  # parameters of the model
    saved_bytes: int  # of a checkpoint's weights
    front: tuple[Way, ...]  # on one device: each needs more than the one before it, and is faster
    chosen: Way | None  # the one of them that the planner takes
    largest_micro_batches: tuple[tuple[Checkpointing, int], ...]  # that fit on one device
    smallest: Way  # least memory on one device, whether it fits or not
    by_num_devices: tuple[tuple[int, Way | None], ...]  # the fastest that fits; None where none does
    remedies: tuple[Remedy, ...]  # empty when something fits

    @property
    def method(self) -> Method:
        return self.settings.method


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAnswer:
    """Whether a known device can run a method: the fastest way that fits, or the smallest that does not."""

    device: str
    usable_bytes: int
    method: Method
    fits: bool
    way: Way


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to run whose memory has not been asked for yet."""

    recipe: StepRecipe
    micro_batch: int
    speed: ThroughputEstimate


class Forecast:
    """Every way to run some settings, and what each is predicted to cost."""

    def __init__(self, models: Models, *, padding_free: bool = False) -> None:
        self.models, self.model, self.padding_free = models, models.model, padding_free

    def ways(self, settings: TrainingSettings, device: DeviceProfile, num_devices: int) -> list[Candidate]:
        """Return every way to run on so many devices, the fastest first; none where they do not divide it."""
        candidates = [
            Candidate(
                recipe=recipe,
                micro_batch=micro_batch,
                speed=self.models.step(recipe, micro_batch, settings.seq_len, device, NUM_THREADS),
            )
            for recipe, micro_batch in recipes(
                settings, device, num_devices, self.model.attention, padding_free=self.padding_free
            )
        ]
        return sorted(candidates, key=lambda one: (-one.speed.tokens_per_s, one.micro_batch))

    def weigh(self, one: Candidate, settings: TrainingSettings, device: DeviceProfile) -> Way:
        """Ask the memory model about a way to run."""
        recipe, micro_batch = one.recipe, one.micro_batch
        run_s = self.models.speed(recipe, micro_batch, settings, device, NUM_THREADS).run_s
        return Way(
            micro_batch=micro_batch,
            gradient_accumulation=recipe.gradient_accumulation,
            checkpointing=recipe.checkpointing,
            sharding=recipe.sharding,
            num_devices=recipe.data_parallel,
            memory=self.models.estimate(recipe, micro_batch, settings.seq_len, device),
            tokens_per_s=one.speed.tokens_per_s,
            run_s=run_s,
            upper_run_s=run_s * one.speed.upper_step_s / one.speed.step_s,
            speed_basis=one.speed.basis,
        )


def plan_method(settings: TrainingSettings, device: DeviceProfile, forecast: Forecast) -> MethodPlan:
    """Return everything that `autosft plan` says of one method on a device."""
    candidates = forecast.ways(settings, device, 1)
    ways = list(ways_worth_weighing(candidates, settings, device, forecast))
    fitting = [one for one in ways if fits(one, device)]
    front = pareto_front(fitting)
    chosen = preferred(front)
    smallest = min(ways, key=lambda one: (one.memory.total_bytes, one.micro_batch))
    nums_devices = NUMS_DEVICES if device.kind is DeviceKind.CUDA else (1,)
    recipe = candidates[0].recipe
    trained = num_trained(forecast.model, recipe)
    return MethodPlan(
        settings=settings,
        precision=recipe.precision,
        num_trained=trained,
        num_total=forecast.model.num_parameters,
        saved_bytes=saved_bytes(forecast.model, recipe),
        front=front,
        chosen=chosen,
        largest_micro_batches=largest_micro_batches(fitting),
        smallest=smallest,
        by_num_devices=tuple(
            (num, chosen if num == 1 else fastest_fitting(settings, device, num, forecast))
            for num in nums_devices
        ),
        remedies=() if front or smallest.memory.untraced else tuple(remedies(settings, device, forecast)),
    )


def default_settings(
    method: Method,
    model: ModelProfile,
    *,
    seq_len: int,
    effective_batch_size: int | None,
    num_train_examples: int,
    adapter: str = "lora",
) -> TrainingSettings:
    """Return the settings that a study would start from; its effective batch, where none is asked for."""
    space = default_space(
        method=method,
        num_parameters=model.num_parameters,
        num_train_examples=num_train_examples,
        seq_lens=[seq_len],
        effective_batch_sizes=default_batches(num_train_examples)
        if effective_batch_size is None
        else [effective_batch_size],
    )
    fixed = FixedSettings(num_train_examples=num_train_examples, seed=0, adapter=adapter)
    return settings_from(space, default_parameters(space), fixed)


def recipes(
    settings: TrainingSettings,
    device: DeviceProfile,
    num_devices: int,
    attention: str = "sdpa",
    *,
    padding_free: bool = False,
) -> Iterator[tuple[StepRecipe, int]]:
    """Yield every (recipe, micro batch) on so many devices: replicas or shards, where there are several."""
    if settings.effective_batch_size % num_devices:
        return
    pinned = pin(settings, device, attention, padding_free=padding_free)
    yield from ways_to_run(settings, pinned, num_devices)


def fits(way: Way, device: DeviceProfile) -> bool:
    """Tell whether a way runs on a device: its upper bound is free, and all of it could be followed."""
    return way.memory.total_bytes <= usable_bytes(device) and not way.memory.untraced


def ways_worth_weighing(
    candidates: Sequence[Candidate], settings: TrainingSettings, device: DeviceProfile, forecast: Forecast
) -> Iterator[Way]:
    """Yield all ways that fit, and the ends of those that do not.

    What a larger micro batch needs is not asked once a smaller one does not fit, but for the whole batch at
    once, which accumulates nothing.
    """
    for checkpointing in Checkpointing:
        alike = [one for one in candidates if one.recipe.checkpointing is checkpointing]
        by_size = sorted(alike, key=lambda one: one.micro_batch)
        for one in by_size[:-1]:
            way = forecast.weigh(one, settings, device)
            yield way
            if not fits(way, device):
                break
        if by_size:
            yield forecast.weigh(by_size[-1], settings, device)


def pareto_front(ways: Sequence[Way]) -> tuple[Way, ...]:
    """Return the ways that no other beats in both memory and speed, the smallest first."""
    front: list[Way] = []
    for way in sorted(ways, key=lambda one: (one.memory.total_bytes, -one.tokens_per_s)):
        if not front or way.tokens_per_s > front[-1].tokens_per_s:
            front.append(way)
    return tuple(front)


def preferred(front: Sequence[Way]) -> Way | None:
    """Return the smallest way that is nearly as fast as the fastest, as the planner chooses."""
    fastest = max((one.tokens_per_s for one in front), default=0.0)
    return next((one for one in front if one.tokens_per_s * WORTHWHILE_SPEEDUP >= fastest), None)


def largest_micro_batches(fitting: Sequence[Way]) -> tuple[tuple[Checkpointing, int], ...]:
    """Return the largest micro batch that fits without and with activation checkpointing."""
    return tuple(
        (checkpointing, max(sizes))
        for checkpointing in Checkpointing
        if (sizes := [one.micro_batch for one in fitting if one.checkpointing is checkpointing])
    )


def fastest_fitting(
    settings: TrainingSettings, device: DeviceProfile, num_devices: int, forecast: Forecast
) -> Way | None:
    """Return the fastest way that fits on each of so many devices, None where there is none."""
    candidates = forecast.ways(settings, device, num_devices)
    for sharding in Sharding:
        alike = [one for one in candidates if one.recipe.sharding is sharding]
        if alike and not fits(smallest_way(alike, settings, device, forecast), device):
            candidates = [one for one in candidates if one not in alike]
    ways = (forecast.weigh(one, settings, device) for one in candidates)
    return next((way for way in ways if fits(way, device)), None)


def smallest_way(
    candidates: Sequence[Candidate], settings: TrainingSettings, device: DeviceProfile, forecast: Forecast
) -> Way:
    """Return the way that needs least of those with the same sharding.

    That is one example at a time with checkpointing, or, where parameters weigh more than activations, the
    whole batch at once: accumulated gradients lie beside the next forward pass.
    """
    spared = [one for one in candidates if one.recipe.checkpointing is not Checkpointing.OFF] or candidates
    by_size = sorted(spared, key=lambda one: one.micro_batch)
    ends = (forecast.weigh(one, settings, device) for one in (by_size[0], by_size[-1]))
    return min(ends, key=lambda way: way.memory.total_bytes)


def remedies(settings: TrainingSettings, device: DeviceProfile, forecast: Forecast) -> Iterator[Remedy]:
    """Yield the nearest changes that would fit, those that cost the result least first.

    An 8-bit optimizer, another method, a shorter length; on GPUs also more of them, or a larger card.
    """
    has_cuda = device.kind is DeviceKind.CUDA

    def remedy(
        change: str, way: Way, quality: str, fields: Mapping[str, Any] | None, on: DeviceProfile = device
    ) -> Remedy:
        return Remedy(change=change, device=on.name, way=way, quality=quality, fields=fields)

    eight_bit = replace(settings, optimizer=EIGHT_BIT_OPTIMIZER)
    is_whole = settings.method in (Method.FULL, Method.SPARSE)
    can_shrink_state = has_cuda and is_whole and eight_bit != settings
    if can_shrink_state and (way := fastest_fitting(eight_bit, device, 1, forecast)):
        fields: dict[str, Any] = {
            "method": settings.method.value,
            "space": {"optimizer": EIGHT_BIT_OPTIMIZER},
        }
        yield remedy(f"--optimizer {EIGHT_BIT_OPTIMIZER}", way, QUALITY["8-bit"], fields)
    for method in SMALLER_METHODS[settings.method]:
        if method is Method.QLORA and not has_cuda:
            continue  # its 4-bit kernels are made for GPUs
        other = default_settings(
            method,
            forecast.model,
            seq_len=settings.seq_len,
            effective_batch_size=settings.effective_batch_size,
            num_train_examples=settings.num_train_examples,
        )
        if way := fastest_fitting(other, device, 1, forecast):
            quality = QUALITY[method.value]
            if settings.method is Method.SPARSE:
                quality += "; zeros are kept only by export --merge --keep-zeros"
            yield remedy(f"--method {method.value}", way, quality, {"method": method.value})
    for seq_len in shorter_lengths(settings.seq_len):
        if way := fastest_fitting(replace(settings, seq_len=seq_len), device, 1, forecast):
            fields = {"method": settings.method.value, "space": {"seq_len": seq_len}}
            yield remedy(f"--seq-len {seq_len}", way, QUALITY["shorter"], fields)
            break
    if not has_cuda:
        return
    for num_devices in MORE_DEVICES:
        if way := fastest_fitting(settings, device, num_devices, forecast):
            yield remedy(f"{num_devices} GPUs", way, QUALITY["same"], None)
            break
    for larger in cards(above_bytes=usable_bytes(device)):
        if way := fastest_fitting(settings, larger, 1, forecast):
            yield remedy(f"--hardware {larger.name}", way, QUALITY["same"], None, on=larger)
            break


def shorter_lengths(seq_len: int) -> list[int]:
    """Return the powers of two below a length, the longest first."""
    return [2**k for k in range(30, 0, -1) if SHORTEST_SEQ_LEN <= 2**k < seq_len]


def what_gpu(settings: TrainingSettings, forecast: Forecast) -> Iterator[DeviceAnswer]:
    """Yield, for every known device, the smallest first, whether it can run the settings and how fast."""
    for device in cards():
        way = fastest_fitting(settings, device, 1, forecast)
        yield DeviceAnswer(
            device=device.name,
            usable_bytes=usable_bytes(device),
            method=settings.method,
            fits=way is not None,
            way=way or smallest_way(forecast.ways(settings, device, 1), settings, device, forecast),
        )


def cards(*, above_bytes: int = 0) -> list[DeviceProfile]:
    """Return the known devices with more usable memory than that, the smallest and then the slowest first."""
    devices = [cluster_from_name(known.name).devices[0] for known in known_devices()]
    return sorted(
        (one for one in devices if usable_bytes(one) > above_bytes),
        key=lambda one: (usable_bytes(one), one.matmul_flops_per_s or 0.0, one.name),
    )
