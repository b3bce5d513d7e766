"""Changes that would make a study fit, each with its memory, its time and its cost in quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.hardware.known_devices import cluster_from_name, known_devices
from autosft.profiles.memory_ways import LEAN_WAYS, METHODS, loss_in_words
from autosft.profiles.optimizers import DEFAULT, FORMER_DEFAULTS
from autosft.profiles.recipe import Method, Sharding
from autosft.profiles.units import duration, gib
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.planner import DoesNotFitError
from autosft.scheduler.plan.forecast import Forecast, Way, default_settings, preferred_fitting
from autosft.studies.request import TuneRequest
from autosft.studies.trial import TrainingSettings

#: Numbers of devices that are proposed if nothing fits on one.
MORE_DEVICES = (2, 4, 8)
SHORTEST_SEQ_LEN = 64
EIGHT_BIT_OPTIMIZER = "adamw_8bit"
#: Usual cost of a change in quality: Dettmers et al. 2022 (8-bit optimizers) and 2023 (QLoRA);
#: Biderman et al. 2024 (LoRA learns less and forgets less).
QUALITY = {
    "8-bit": "none measurable",
    "lora": "little on instructions, more on code, maths and new knowledge",
    "qlora": "as LoRA; 4 bits cost nothing measurable on top",
    "shorter": "truncated tokens are not learned",
    "same": "none",
}
#: Methods to try instead of one that does not fit.
SMALLER_METHODS = {
    Method.FULL: (Method.LORA, Method.QLORA),
    Method.SPARSE: (Method.LORA, Method.QLORA),
    Method.LORA: (Method.QLORA,),
    Method.QLORA: (),
}


class TooLittleMemoryError(DoesNotFitError):
    """Nothing that was requested fits; `offers` are changes that would, which the message lists."""

    def __init__(self, cause: DoesNotFitError, offers: Sequence[Remedy]) -> None:
        remedy = "\n".join(("Would fit:", *(f"  {line}" for line in offer_lines(offers))))
        super().__init__(
            cause.message,
            remedy=remedy if offers else cause.remedy,
            smallest=cause.smallest,
            settings=cause.settings,
            device=cause.device,
        )
        self.offers = tuple(offers)


def too_little_memory(cause: DoesNotFitError, models: Models) -> TooLittleMemoryError:
    """Return the error with changes that would fit; there are none if memory could not be predicted."""
    if cause.smallest.untraced or cause.smallest.refused:
        return TooLittleMemoryError(cause, ())
    return TooLittleMemoryError(cause, tuple(remedies(cause.settings, cause.device, Forecast(models))))


def offer_lines(offers: Sequence[Remedy]) -> list[str]:
    """Format each offer as one line: change, memory, time, loss of quality."""
    width = max((len(describe_change(offer)) for offer in offers), default=0)
    lines = []
    for offer in offers:
        memory = offer.way.memory
        needed = gib(memory.need.median_bytes + memory.outside_bytes)
        lines.append(
            f"{describe_change(offer):{width}}  needs {needed} (at most {gib(memory.total_bytes)}), "
            f"about {duration(offer.way.run_s)}; usual loss of quality: {offer.quality}"
        )
    return lines


def describe_change(offer: Remedy) -> str:
    sharding = offer.way.sharding
    return offer.change + ("" if sharding is Sharding.NONE else f" with {sharding.value.upper()}")


def takeable(offers: Sequence[Remedy]) -> list[Remedy]:
    """Return the offers that do not need another machine."""
    return [offer for offer in offers if offer.fields is not None]


def taken(request: TuneRequest, offer: Remedy) -> TuneRequest:
    """Return the request with an offer's change applied."""
    assert offer.fields is not None, "an offer that needs another machine cannot be applied"
    fields = dict(offer.fields)
    space = {**request.space, **fields.pop("space", {})}
    return request.model_copy(update={**fields, "space": space})


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A change that would fit, and how the study would run then."""

    change: str  # a flag, or a description of what is needed
    device: str
    way: Way
    quality: str  # its usual cost in quality, as text
    fields: Mapping[str, Any] | None  # of a TuneRequest that makes the change; None: needs another machine


def remedies(settings: TrainingSettings, device: DeviceProfile, forecast: Forecast) -> Iterator[Remedy]:
    """Yield the smallest changes that would fit, those that cost the least quality first.

    A lean way to hold weights and moments, an 8-bit optimizer, another method, a shorter length; on GPUs also
    more of them, or a larger one.
    """
    yield from lean_ways(settings, device, forecast)
    if device.kind.traits.has_bitsandbytes:
        yield from smaller_optimizer(settings, device, forecast)
    yield from smaller_methods(settings, device, forecast)
    yield from shorter_examples(settings, device, forecast)
    if device.kind.traits.forms_gangs:
        yield from more_devices(settings, device, forecast)
        yield from larger_device(settings, device, forecast)


def lean_ways(settings: TrainingSettings, device: DeviceProfile, forecast: Forecast) -> Iterator[Remedy]:
    """Yield the first way to hold weights and moments in fewer bits that fits, where the study chooses them.

    A device without bf16 has none, and neither has a request for another precision or optimizer.
    """
    is_default = forecast.precision is None and settings.optimizer in (DEFAULT, *FORMER_DEFAULTS)
    if settings.method not in METHODS or not device.supports_bf16 or not is_default:
        return
    for way in LEAN_WAYS:
        assert way.optimizer is not None
        held = replace(settings, optimizer=way.optimizer)
        if found := preferred_fitting(held, device, 1, forecast.in_precision(way.precision)):
            yield Remedy(
                change=f"--memory {way.name}",
                device=device.name,
                way=found,
                quality=loss_in_words(way),
                fields={"method": settings.method.value, "memory": way.name},
            )
            return


def smaller_optimizer(
    settings: TrainingSettings, device: DeviceProfile, forecast: Forecast
) -> Iterator[Remedy]:
    """Yield the 8-bit optimizer, if its state is what makes the difference."""
    eight_bit = replace(settings, optimizer=EIGHT_BIT_OPTIMIZER)
    trains_all_weights = settings.method in (Method.FULL, Method.SPARSE)
    if not trains_all_weights or eight_bit == settings:
        return
    if way := preferred_fitting(eight_bit, device, 1, forecast):
        yield Remedy(
            change=f"--optimizer {EIGHT_BIT_OPTIMIZER}",
            device=device.name,
            way=way,
            quality=QUALITY["8-bit"],
            fields={"method": settings.method.value, "space": {"optimizer": EIGHT_BIT_OPTIMIZER}},
        )


def smaller_methods(
    settings: TrainingSettings, device: DeviceProfile, forecast: Forecast
) -> Iterator[Remedy]:
    """Yield the methods that need less memory and fit."""
    for method in SMALLER_METHODS[settings.method]:
        if method is Method.QLORA and not device.kind.traits.has_bitsandbytes:
            continue  # its 4-bit kernels are bitsandbytes'
        other = default_settings(
            method,
            forecast.model,
            seq_len=settings.seq_len,
            effective_batch_size=settings.effective_batch_size,
            num_train_examples=settings.num_train_examples,
        )
        if way := preferred_fitting(other, device, 1, forecast):
            quality = QUALITY[method.value]
            if settings.method is Method.SPARSE:
                quality += "; zeros are kept only by export --merge --keep-zeros"
            yield Remedy(
                change=f"--method {method.value}",
                device=device.name,
                way=way,
                quality=quality,
                fields={"method": method.value},
            )


def shorter_examples(
    settings: TrainingSettings, device: DeviceProfile, forecast: Forecast
) -> Iterator[Remedy]:
    """Yield the longest shorter truncation length that fits."""
    for seq_len in shorter_lengths(settings.seq_len):
        if way := preferred_fitting(replace(settings, seq_len=seq_len), device, 1, forecast):
            yield Remedy(
                change=f"--seq-len {seq_len}",
                device=device.name,
                way=way,
                quality=QUALITY["shorter"],
                fields={"method": settings.method.value, "space": {"seq_len": seq_len}},
            )
            return


def more_devices(settings: TrainingSettings, device: DeviceProfile, forecast: Forecast) -> Iterator[Remedy]:
    """Yield the smallest number of such devices that the settings fit on."""
    for num_devices in MORE_DEVICES:
        if way := preferred_fitting(settings, device, num_devices, forecast):
            yield Remedy(
                change=f"{num_devices} {device.kind.traits.label}s",
                device=device.name,
                way=way,
                quality=QUALITY["same"],
                fields=None,
            )
            return


def larger_device(settings: TrainingSettings, device: DeviceProfile, forecast: Forecast) -> Iterator[Remedy]:
    """Yield the smallest known device that the settings fit on."""
    for larger in cards(above_bytes=usable_bytes(device)):
        if way := preferred_fitting(settings, larger, 1, forecast):
            yield Remedy(
                change=f"--hardware {larger.name}",
                device=larger.name,
                way=way,
                quality=QUALITY["same"],
                fields=None,
            )
            return


def shorter_lengths(seq_len: int) -> list[int]:
    """Return the powers of two below a length, longest first."""
    return [2**k for k in range(30, 0, -1) if SHORTEST_SEQ_LEN <= 2**k < seq_len]


def cards(*, above_bytes: int = 0) -> list[DeviceProfile]:
    """Return the known devices with more usable memory than this, ordered by memory, then speed."""
    devices = [cluster_from_name(known.name).devices[0] for known in known_devices()]
    return sorted(
        (device for device in devices if usable_bytes(device) > above_bytes),
        key=lambda device: (usable_bytes(device), device.matmul_flops_per_s or 0.0, device.name),
    )
