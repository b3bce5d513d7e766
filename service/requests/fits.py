"""Would this fit, and how long would it take: what `GET /fits` answers.

As `autosft plan` plans it, in fewer words; runs in the planner's process (`planner_process`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.benchmark import with_measured_rates
from autosft.profiles.hardware.device import ClusterProfile, usable_bytes
from autosft.profiles.hardware.known_devices import cluster_from_name
from autosft.profiles.memory_ways import require_way
from autosft.profiles.own_folders import cache_folder
from autosft.profiles.recipe import Checkpointing
from autosft.scheduler.plan.asked import Asked
from autosft.scheduler.plan.forecast import Way
from autosft.scheduler.plan.method_plan import MethodPlan
from autosft.scheduler.plan.methods import METHODS, methods_to_plan
from autosft.scheduler.plan.remedies import Remedy, describe_change
from autosft.scheduler.plan.task import read_task
from autosft.scheduler.setup.inputs import devices_named
from autosft.scheduler.setup.learned import learned_so_far


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked; `device` is "auto", this server's, or a known one, as in `--hardware 2xA100-80GB`."""

    model: str
    data: str | None = None
    seq_len: int | None = None
    method: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    memory: str = "exact"
    effective_batch_size: int | None = None
    epochs: float = 3.0

    def as_plain(self) -> dict[str, Any]:
        return asdict(self)


def answer(question: Question, hardware: str, storage: str) -> dict[str, Any]:
    """Plan each method on the device with the least memory.  Raises UserError."""
    if question.method not in ("auto", *METHODS, "sparse"):
        raise UserError(
            f"method {question.method[:80]}: not a method.",
            remedy=f"Use auto, {', '.join(METHODS)} or sparse.",
        )
    require_way(question.memory, question.method, question.precision, has_optimizer=False)
    cluster = _devices(question.device, hardware)
    device = min(cluster.devices, key=lambda each: (usable_bytes(each), each.uuid))
    number = sum(each.name == device.name for each in cluster.devices)
    cache = cache_folder()
    task = read_task(
        question.model,
        question.data,
        question.seq_len,
        question.epochs,
        cache / "data",
        trust_remote_code=False,
    )
    asked = Asked(precision=question.precision, memory=question.memory)
    methods = asked.trainable(
        methods_to_plan(task, question.method, "lora"), is_comparison=question.method == "auto"
    )
    asked.check(methods, device, None)
    forecast = task.forecast(learned_so_far(storage), cache / "memory")
    plans = [
        _of_method(plan)
        for method in methods
        for plan in asked.plans(
            task.settings(method, question.effective_batch_size, "lora"), device, forecast, number
        )
    ]
    return {
        "fits": any(plan["fits"] for plan in plans),
        "model": task.model.source,
        "num_parameters": task.model.num_parameters,
        "data": None if task.data is None else task.data.source,
        "seq_len": task.seq_len,
        "num_train_examples": task.num_train_examples,
        "is_assumed": task.data is None,  # the number of examples, and that all are of this length
        "device": device.name,
        "num_devices": number,
        "usable_bytes": usable_bytes(device),
        "methods": plans,
    }


def _devices(named: str, hardware: str) -> ClusterProfile:
    """Return the devices of this server, or known ones; a file is not read."""
    if named == "auto":
        return devices_named(hardware)
    return with_measured_rates(cluster_from_name(named))


def _of_method(plan: MethodPlan) -> dict[str, Any]:
    way = plan.chosen or plan.together or plan.measured_with
    return {
        "method": plan.method.value,
        "memory": plan.memory,
        "precision": plan.precision.value,
        "fits": way is not None,
        "measures_itself": way is not None and way is plan.measured_with,
        "num_trained": plan.num_trained,
        "way": _of_way(way or plan.smallest),
        "would_fit": [_of_remedy(remedy) for remedy in plan.remedies],
    }


def _of_way(way: Way) -> dict[str, Any]:
    """Return how it would run; all figures are predicted."""
    return {
        "micro_batch": way.micro_batch,
        "gradient_accumulation": way.gradient_accumulation,
        "num_devices": way.num_devices,
        "sharding": way.sharding.value,
        "checkpointing": way.checkpointing is not Checkpointing.OFF,
        "predicted_bytes": way.memory.need.median_bytes + way.memory.outside_bytes,
        "upper_bytes": way.memory.total_bytes,
        "seconds": way.run_s,
        "upper_seconds": way.upper_run_s,
        "tokens_per_s": way.tokens_per_s,
        "speed_basis": way.speed_basis,
    }


def _of_remedy(remedy: Remedy) -> dict[str, Any]:
    return {"change": describe_change(remedy), "quality": remedy.quality, "way": _of_way(remedy.way)}


__all__ = ["Question", "answer"]
