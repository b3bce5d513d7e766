"""A configuration on other devices: what has to change, what may not, and what would fit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.profiles.hardware.known_devices import cluster_from_name
from autosft.profiles.optimizers import require_optimizer
from autosft.profiles.recipe import (
    ByteRange,
    Checkpointing,
    MemoryEstimate,
    Method,
    Precision,
    Sharding,
    StepRecipe,
)
from autosft.scheduler.decide.history import measured_run
from autosft.scheduler.decide.measured_memory import MeasuredMemory
from autosft.scheduler.decide.planner import Costs, DoesNotFitError
from autosft.scheduler.train.replan import replan
from autosft.studies.export import DataSource, Expected, ExportedConfig, ModelSource
from tests.plans import execution_plan
from tests.scheduler.decide.test_planner import PINNED, memory, speed
from tests.scheduler.devices import GIB, gpu
from tests.scheduler.model import MODEL
from tests.workers.small import settings


class StubModels:
    """The planner's test models: 4 GiB resident, 1 GiB an example."""

    model = SimpleNamespace(source="model", quantization=None)
    costs = Costs(memory=memory, speed=speed)
    model = MODEL


def config(**changes: Any) -> ExportedConfig:
    """A configuration found on an A100 of 80 GB: micro batch 16 of 64, bf16."""
    made = ExportedConfig(
        format=1,
        autosft="0.1.0",
        study="found elsewhere",
        trial=3,
        model=ModelSource(name="model", fingerprint="m"),
        data=DataSource(source="data.jsonl", fingerprint="d"),
        settings=settings(effective_batch_size=64, seq_len=1024),
        pinned=PINNED,
        expected=Expected(
            metric="eval_loss", value=1.0, step=10, num_tokens=10, final_value=1.0, peak_allocated_bytes=None
        ),
        plan=execution_plan(micro_batch=16, effective_batch_size=64, device_name="A100-80GB"),
    )
    return replace(made, **changes)


def laptop() -> DeviceProfile:
    [device] = cluster_from_name("RTX-4060-Laptop").devices
    return device


def cpu() -> DeviceProfile:
    return replace(
        gpu(), kind=DeviceKind.CPU, name="A CPU", compute_capability=None, supports_bf16=False, num_cores=8
    )


def test_a_smaller_card_keeps_the_effective_batch_and_says_what_changed() -> None:
    made = replan(config(), [laptop()], StubModels(), precision=None)  # type: ignore[arg-type]
    plan = made.plan
    assert plan.micro_batch * plan.gradient_accumulation * plan.data_parallel == 64
    assert plan.estimate.total_bytes <= laptop().free_bytes
    assert (plan.micro_batch, plan.checkpointing) == (8, Checkpointing.NON_REENTRANT)
    assert made.pinned == PINNED
    assert made.changes == (
        "micro batch 16 -> 8",
        "accumulation 4 -> 8",
        "checkpointing off -> non-reentrant",
    )
    assert made.numerics == ()


def test_the_same_card_changes_nothing() -> None:
    there = replace(gpu(free_bytes=79 * GIB), name="A100-80GB")
    first = replan(config(), [there], StubModels(), precision=None)  # type: ignore[arg-type]
    again = replan(config(plan=first.plan), [there], StubModels(), precision=None)  # type: ignore[arg-type]
    assert again.plan == first.plan
    assert again.changes == ()


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad"])
def test_what_an_earlier_version_found_is_trained_as_it_was(optimizer: str) -> None:
    """A new study refuses weight decay with these; a configuration is gone on with as recorded."""
    found = config()
    found = replace(found, settings=replace(found.settings, optimizer=optimizer, weight_decay=0.1))
    made = replan(found, [laptop()], StubModels(), precision=None)  # type: ignore[arg-type]
    assert made.plan.micro_batch > 0
    with pytest.raises(UserError, match="keeps its trials"):
        require_optimizer(
            optimizer, method=Method.FULL, on_gpu=True, precision=Precision.BF16_AUTOCAST, largest_decay=0.1
        )


def test_the_first_device_that_fits_is_taken() -> None:
    small = replace(gpu(0, free_bytes=3 * GIB), name="small")
    made = replan(config(), [small, gpu(1)], StubModels(), precision=None)  # type: ignore[arg-type]
    assert made.devices[0].uuid == "GPU-1"


def test_a_cpu_with_bf16_instructions_trains_in_the_precision_of_the_file() -> None:
    able = replace(cpu(), supports_bf16=True)
    made = replan(config(), [able], StubModels(), precision=None)  # type: ignore[arg-type]
    assert made.pinned.precision is Precision.BF16_AUTOCAST


def test_another_precision_is_never_taken_without_being_asked_for() -> None:
    with pytest.raises(UserError, match=r"bf16-autocast, which autosft does not support on A CPU") as raised:
        replan(config(), [cpu()], StubModels(), precision=None)  # type: ignore[arg-type]
    assert "--precision fp32" in (raised.value.remedy or "")
    made = replan(config(), [cpu()], StubModels(), precision=Precision.FP32)  # type: ignore[arg-type]
    assert made.pinned == replace(PINNED, precision=Precision.FP32, tf32=False)
    assert made.numerics == ("precision bf16-autocast -> fp32, as asked",)
    assert made.plan.micro_batch * made.plan.gradient_accumulation == 64
    assert made.plan.num_threads == 8
    with pytest.raises(UserError, match="scaler refuses fp16 gradients"):
        replan(config(), [gpu()], StubModels(), precision=Precision.FP16)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fp16-autocast"):
        replan(config(), [cpu()], StubModels(), precision=Precision.FP16_AUTOCAST)  # type: ignore[arg-type]


def test_after_an_out_of_memory_only_less_is_planned() -> None:
    made = config()
    first = replan(made, [laptop()], StubModels(), precision=None).plan  # type: ignore[arg-type]
    ran_out = measured_run(
        made.settings, made.pinned, first, peak_bytes=None, reserved_bytes=None, out_of_memory=True
    )
    measured = MeasuredMemory().with_run(ran_out)
    less = replan(made, [laptop()], StubModels(), precision=None, measured=measured).plan  # type: ignore[arg-type]
    assert less.estimate.need.median_bytes < first.estimate.need.median_bytes
    assert less.micro_batch < first.micro_batch
    assert less.micro_batch * less.gradient_accumulation == 64
    assert less.measures_itself


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(DoesNotFitError) as raised:
        replan(config(), [gpu(free_bytes=5 * GIB)], StubModels(), precision=None)  # type: ignore[arg-type]
    assert "5.0 GiB free" in raised.value.message
    remedy = raised.value.remedy or ""
    assert "Would fit: a device with 5.8 GiB free, such as RTX-" in remedy
    assert "--method lora" in remedy


@pytest.mark.parametrize(
    ("devices", "together", "expect"),
    [
        ([gpu(0), gpu(1)], False, ["GPU-0"]),
        ([gpu(0), gpu(1)], True, ["GPU-0", "GPU-1"]),
        ([gpu(1), gpu(0)], True, ["GPU-1", "GPU-0"]),
        ([gpu(0), gpu(1), gpu(2)], True, ["GPU-0", "GPU-1"]),  # three do not divide 64
        ([replace(gpu(0), name="another"), gpu(1), gpu(2)], True, ["GPU-1", "GPU-2"]),
        ([replace(gpu(0), is_mig=True), replace(gpu(1), is_mig=True)], True, ["GPU-0"]),
    ],
)
def test_devices_that_were_asked_for_train_together(
    devices: list[DeviceProfile], together: bool, expect: list[str]
) -> None:
    made = replan(config(), devices, StubModels(), precision=None, together=together)  # type: ignore[arg-type]
    assert [device.uuid for device in made.devices] == expect
    plan = made.plan
    assert plan.data_parallel == len(expect)
    assert plan.micro_batch * plan.gradient_accumulation * plan.data_parallel == 64


def test_what_fits_no_device_is_planned_for_as_few_as_it_takes() -> None:
    def sharded(recipe: StepRecipe, *rest: Any) -> MemoryEstimate:
        found = memory(recipe, *rest)
        scale = 8 // recipe.data_parallel if recipe.sharding is Sharding.FSDP else 8
        few = ByteRange(median_bytes=scale * GIB, upper_bytes=scale * GIB)
        return replace(found, need=few, allocated=few)

    class Sharded(StubModels):
        costs = Costs(memory=sharded, speed=speed)

    four = [gpu(number, free_bytes=3 * GIB) for number in range(4)]
    made = replan(config(), four, Sharded(), precision=None)  # type: ignore[arg-type]
    assert len(made.devices) == 4
    assert made.plan.sharding is Sharding.FSDP
