"""What `autosft plan` is asked for: a precision, ways to hold what is trained, settings of adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.memory.trainable import num_trained
from autosft.profiles.memory_ways import AUTO, EXACT, METHODS, MemoryWay, ways_of
from autosft.profiles.model.adapters import unused_settings
from autosft.profiles.optimizers import DEFAULT, require_optimizer
from autosft.profiles.recipe import Method, Precision, why_not_trained
from autosft.scheduler.decide.numerics import can_hold, study_precision
from autosft.scheduler.plan.forecast import Forecast
from autosft.scheduler.plan.method_plan import MethodPlan, plan_method
from autosft.scheduler.plan.task import Task
from autosft.studies.search.dimensions import Dimension
from autosft.studies.search.parsing import parse_dimension
from autosft.studies.trial import TrainingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The flags of a plan that change what the same settings need; `autosft tune` has the same ones."""

    precision: str = "auto"  # or the name of one
    memory: str = EXACT.name  # a row of `memory_ways.WAYS`, or "auto" for all of them

    def trainable(self, methods: tuple[Method, ...], *, is_comparison: bool) -> tuple[Method, ...]:
        """Return the methods that the precision can train; a comparison leaves out the others."""
        if not is_comparison or self.precision == "auto":
            return methods
        return tuple(each for each in methods if not why_not_trained(each, Precision(self.precision)))

    def check(self, methods: Iterable[Method], device: DeviceProfile, optimizer: str | None) -> None:
        """Raise UserError where the device or a method cannot do what is asked."""
        on_gpu = device.kind.traits.has_own_memory
        for way in ways_of(self.memory) if self.memory != AUTO else ():
            if not can_hold(way, device):
                raise UserError(
                    f"--memory {way.name}: {device.name} does not compute in bf16.",
                    remedy="Use --memory exact, or a GPU of compute capability 8.0 or newer.",
                )
        for method in methods:
            precision = study_precision(self.precision, device, method)
            require_optimizer(
                optimizer or DEFAULT, method=method, on_gpu=on_gpu, precision=precision, is_run_here=False
            )

    def ways(self, method: Method) -> tuple[MemoryWay, ...]:
        """Return the ways to hold what a method trains."""
        return ways_of(self.memory) if method in METHODS else (EXACT,)

    def only(self, settings: TrainingSettings, forecast: Forecast) -> tuple[TrainingSettings, Forecast]:
        """Return settings and forecast of the last of the ways that are asked for, which needs the least."""
        way = self.ways(settings.method)[-1]
        precision = None if self.precision == "auto" else Precision(self.precision)
        held = replace(settings, optimizer=way.optimizer or settings.optimizer)
        return held, forecast.in_precision(way.precision or precision)

    def plans(
        self, settings: TrainingSettings, device: DeviceProfile, forecast: Forecast, at_hand: int
    ) -> Iterator[MethodPlan]:
        """Yield the plan of a method, one for each way to hold what it trains that the device can compute."""
        precision = None if self.precision == "auto" else Precision(self.precision)
        for way in self.ways(settings.method):
            if can_hold(way, device):
                yield plan_method(settings, device, forecast.in_precision(precision), at_hand, way=way)


def lora_settings(
    task: Task, method: str, adapter: str, *, lora_rank: int | None, lora_targets: str | None
) -> dict[str, Dimension]:
    """Return the given settings of adapters.  Raises UserError where there is no adapter that has them."""
    given = {"lora_rank": lora_rank, "lora_targets": lora_targets}
    found = {name: value for name, value in given.items() if value is not None}
    for name in found:
        flag = f"--{name.replace('_', '-')}"
        if method in ("full", "sparse"):
            raise UserError(f"{flag}: --method {method} trains no adapter.", remedy="Use --method lora.")
        if name in unused_settings(adapter):
            raise UserError(f"--adapter {adapter} has no {name}.", remedy=f"Remove {flag}.")
        if task.model.adapter is not None:
            raise UserError(
                f"{flag}: {task.model.source} is an adapter, from which training continues as it is.",
                remedy=f"Remove {flag}, or give its base model.",
            )
    dimensions = {name: parse_dimension(name, value) for name, value in found.items()}
    if lora_targets is not None:
        require_targets(task, dimensions, adapter)
    return dimensions


def require_targets(task: Task, fixed: dict[str, Dimension], adapter: str) -> None:
    """Raise UserError where the model has no module of those names."""
    settings = replace(task, fixed=fixed).settings(Method.LORA, None, adapter)
    assert settings.adapter is not None
    if settings.adapter.targets != "all-linear":
        model = task.model
        num_trained(model.config_json, settings.adapter, trust_remote_code=model.trust_remote_code)
