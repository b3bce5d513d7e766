from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.recipe import (
    ByteRange,
    Checkpointing,
    MemoryEstimate,
    Method,
    Precision,
    Sharding,
    StepRecipe,
)
from autosft.scheduler.decide.numerics import pin_precision
from autosft.scheduler.decide.planner import (
    Costs,
    DoesNotFitError,
    Room,
    StepSpeed,
    divisors,
    gang_sizes,
    is_known_to_fit,
    plan,
    recipe_for,
    ways_to_run,
)
from autosft.scheduler.decide.self_measuring import Measuring, plan_or_measure
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings
from tests.plans import memory_estimate
from tests.scheduler.devices import GIB, gpu
from tests.workers.small import settings

PINNED = PinnedSettings(
    precision=Precision.BF16_AUTOCAST,
    tf32=True,
    attention="sdpa",
    eval_seq_len=1024,
    eval_micro_batch=4,
    eval_fingerprint="",
    num_evaluations=4,
)


def memory(recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile) -> MemoryEstimate:
    """4 GiB resident, 1 GiB an example (a quarter of it with checkpointing), 1 GiB outside."""
    per_example = GIB if recipe.checkpointing is Checkpointing.OFF else GIB // 4
    need = 4 * GIB + micro_batch * per_example * seq_len // 1024
    return replace(
        memory_estimate(), need=ByteRange(median_bytes=need, upper_bytes=need + GIB // 2), outside_bytes=GIB
    )


def speed(
    recipe: StepRecipe, micro_batch: int, what: TrainingSettings, device: DeviceProfile, num_threads: int
) -> StepSpeed:
    """Faster with the micro batch up to 8; checkpointing costs a quarter."""
    rate = 1000.0 * min(micro_batch, 8) * (1 if recipe.checkpointing is Checkpointing.OFF else 0.75)
    return StepSpeed(tokens_per_s=rate, run_s=1e6 / rate)


def planned(budget_gib: float, *, batch: int = 16, num_devices: int = 1) -> ExecutionPlan:
    return plan(
        settings(effective_batch_size=batch, seq_len=1024),
        PINNED,
        Room(device=gpu(), budget_bytes=int(budget_gib * GIB), num_devices=num_devices),
        Costs(memory=memory, speed=speed),
    )


CASES = [
    ("no more memory than is worth it", 80, 8, Checkpointing.OFF),
    ("checkpointing when a larger micro batch pays for it", 10, 8, Checkpointing.NON_REENTRANT),
    ("the largest that fits", 7, 4, Checkpointing.NON_REENTRANT),
]


REASONS = [
    (80, {}, "micro batch 8: larger ones are predicted to be no more than 3 % faster."),
    (80, {"batch": 8}, "micro batch 8 is the whole effective batch."),
    (80, {"num_devices": 2}, "micro batch 8 on each of 2 devices is the whole effective batch."),
    (
        7,
        {},
        "micro batch 4 with activation checkpointing is the fastest that fits: "
        "micro batch 8 would need 7.5 GiB of 7.0 GiB.",
    ),
    (
        10,
        {},
        "micro batch 8 with activation checkpointing is the fastest that fits: "
        "micro batch 8 without it would need 13.5 GiB of 10.0 GiB.",
    ),
]


@pytest.mark.parametrize(("budget", "given", "reason"), REASONS)
def test_a_plan_says_why(budget: float, given: dict[str, int], reason: str) -> None:
    assert planned(budget, **given).reason == reason


def test_what_takes_exactly_the_budget_fits() -> None:
    estimate = memory_estimate()
    assert is_known_to_fit(estimate, estimate.total_bytes)
    assert not is_known_to_fit(estimate, estimate.total_bytes - 1)


@pytest.mark.parametrize(
    ("slower", "micro_batch"), [(1.0, 4), (0.98, 4), (0.96, 8)], ids=["as fast", "nearly", "slower"]
)
def test_among_those_that_are_nearly_as_fast_the_smallest_is_taken(slower: float, micro_batch: int) -> None:
    """3 % is worth no memory; 4 % is."""

    def by_rows(recipe: StepRecipe, rows: int, *_: object) -> StepSpeed:
        is_plain = recipe.checkpointing is Checkpointing.OFF
        rate = {4: 1000.0 * slower, 8: 1000.0}.get(rows, 1.0) if is_plain else 1.0
        return StepSpeed(tokens_per_s=rate, run_s=1.0)

    chosen = plan(
        settings(effective_batch_size=16, seq_len=1024),
        PINNED,
        Room(device=gpu(), budget_bytes=80 * GIB),
        Costs(memory=memory, speed=by_rows),
    )
    assert chosen.micro_batch == micro_batch


def test_one_device_shards_nothing() -> None:
    """Even where several could."""
    ways = list(ways_to_run(settings(effective_batch_size=4), PINNED))
    assert {(recipe.sharding, recipe.data_parallel) for recipe, _ in ways} == {(Sharding.NONE, 1)}
    assert {(recipe.gradient_accumulation, rows) for recipe, rows in ways} == {(4, 1), (2, 2), (1, 4)}


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize(("pinned_rows", "rows"), [(4, 4), (0, None)])
def test_a_recipe_is_that_of_the_settings(padding_free: bool, pinned_rows: int, rows: int | None) -> None:
    """An order matters to rows without padding alone; 0 is an evaluation batch that was not pinned."""
    pinned = replace(PINNED, padding_free=padding_free, eval_micro_batch=pinned_rows)
    given = settings()
    recipe = recipe_for(given, pinned, Checkpointing.NON_REENTRANT, 3)
    assert recipe.order == (given.order if padding_free else None)
    assert recipe.eval_micro_batch == rows
    assert recipe.sorts_steps
    assert (recipe.checkpointing, recipe.gradient_accumulation) == (Checkpointing.NON_REENTRANT, 3)


@pytest.mark.parametrize(("name", "budget", "micro_batch", "checkpointing"), CASES, ids=str)
def test_plan(name: str, budget: float, micro_batch: int, checkpointing: Checkpointing) -> None:
    chosen = planned(budget)
    assert (chosen.micro_batch, chosen.checkpointing) == (micro_batch, checkpointing)
    assert chosen.memory_cap_bytes + GIB == chosen.estimate.total_bytes


def test_what_does_not_fit_is_refused_in_figures_with_a_way_out() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        planned(5)
    assert "needs 4.2 GiB (at most 5.8 GiB)" in caught.value.message
    assert "5.0 GiB free: 768 MiB are missing" in caught.value.message
    assert "--method lora, a shorter --seq-len than 1024" in str(caught.value.remedy)
    with pytest.raises(DoesNotFitError, match=r"; each of 2 Some GPU has 4\.0 GiB free: .* are missing"):
        planned(4, num_devices=2)
    with pytest.raises(DoesNotFitError, match=r"; Some GPU has 5\.0 GiB free"):
        planned(5)


def test_an_operator_that_could_not_be_followed_is_never_said_to_fit() -> None:
    def unknown(recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile) -> MemoryEstimate:
        return replace(memory(recipe, micro_batch, seq_len, device), untraced=("the operator custom::op",))

    room, costs = Room(device=gpu(), budget_bytes=80 * GIB), Costs(memory=unknown, speed=speed)
    with pytest.raises(DoesNotFitError, match="could not follow the operator custom::op"):
        plan(settings(), PINNED, room, costs)


def test_what_must_not_run_is_refused_whatever_its_memory() -> None:
    def refused(recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile) -> MemoryEstimate:
        return replace(
            memory(recipe, micro_batch, seq_len, device), refused="it would train half of the model"
        )

    room, costs = Room(device=gpu(), budget_bytes=80 * GIB), Costs(memory=refused, speed=speed)
    for measuring in Measuring:
        with pytest.raises(DoesNotFitError, match="it would train half of the model"):
            plan_or_measure(settings(), PINNED, room, costs, measuring)


@given(budget=st.floats(6, 40), batch=st.integers(1, 96))
def test_every_plan_fits_and_keeps_the_effective_batch(budget: float, batch: int) -> None:
    chosen = planned(budget, batch=batch)
    assert chosen.estimate.total_bytes <= budget * GIB
    assert chosen.micro_batch * chosen.gradient_accumulation * chosen.data_parallel == batch


@given(budget=st.floats(6, 40), batch=st.integers(1, 96), at_most=st.integers(1, 16))
def test_several_devices_divide_the_effective_batch_exactly(budget: float, batch: int, at_most: int) -> None:
    sizes = gang_sizes(batch, at_most)
    assert sizes == [item for item in range(2, at_most + 1) if batch % item == 0]
    for num_devices in sizes:
        chosen = planned(budget, batch=batch, num_devices=num_devices)
        assert chosen.data_parallel == num_devices
        assert chosen.sharding in (Sharding.DDP, Sharding.FSDP)
        assert chosen.micro_batch * chosen.gradient_accumulation * num_devices == batch
        assert chosen.estimate.total_bytes <= budget * GIB


@given(smaller=st.floats(5, 40), more=st.floats(0, 40), batch=st.integers(1, 64))
def test_a_larger_budget_never_removes_a_plan_nor_makes_it_slower(
    smaller: float, more: float, batch: int
) -> None:
    try:
        first = planned(smaller, batch=batch)
    except DoesNotFitError:
        return
    second = planned(smaller + more, batch=batch)
    assert second.predicted_tokens_per_s * 1.03 >= first.predicted_tokens_per_s


@given(st.integers(1, 500))
def test_divisors(number: int) -> None:
    assert divisors(number) == sorted(item for item in range(1, number + 1) if number % item == 0)


@pytest.mark.parametrize(
    ("supports_bf16", "method", "expected"),
    [
        (True, Method.FULL, Precision.BF16_AUTOCAST),
        (True, Method.LORA, Precision.BF16),
        (False, Method.FULL, Precision.FP16_AUTOCAST),
        (False, Method.LORA, Precision.FP16),
        (False, Method.QLORA, Precision.FP16),
    ],
)
def test_precision(supports_bf16: bool, method: Method, expected: Precision) -> None:
    assert pin_precision(replace(gpu(), supports_bf16=supports_bf16), method) is expected


@pytest.mark.parametrize(
    ("method", "precision", "optimizer", "expect"),
    [
        (Method.FULL, Precision.BF16_AUTOCAST, "adamw_torch", {Sharding.DDP, Sharding.FSDP}),
        (Method.QLORA, Precision.BF16, "adamw_torch", {Sharding.DDP}),
        (Method.FULL, Precision.FP16_AUTOCAST, "adamw_torch", {Sharding.DDP}),
        (Method.LORA, Precision.FP16, "adamw_torch", {Sharding.DDP}),
        (Method.FULL, Precision.BF16, "paged_adamw_8bit", {Sharding.DDP}),
    ],
)
def test_what_cannot_be_sharded_is_not_planned_so(
    method: Method, precision: Precision, optimizer: str, expect: set[Sharding]
) -> None:
    what = replace(settings(effective_batch_size=4), method=method, optimizer=optimizer)
    ways = ways_to_run(what, replace(PINNED, precision=precision), 2)
    assert {recipe.sharding for recipe, _ in ways} == expect
