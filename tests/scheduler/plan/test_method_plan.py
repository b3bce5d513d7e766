"""What `autosft plan` says, on the real memory and speed models and a model of 22 million parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceKind, DeviceProfile, usable_bytes
from autosft.profiles.memory.calibration import Calibration, CalibrationRow
from autosft.profiles.model.profile import ModelProfile, load_model_profile
from autosft.profiles.recipe import Checkpointing, LengthProfile, Method, Precision, Sharding
from autosft.profiles.speed.measured import KindOfRun, MeasuredSpeeds, SpeedRow
from autosft.scheduler.decide import cost_models, numerics, planner
from autosft.scheduler.decide import numerics as numerics_module
from autosft.scheduler.decide.cost_models import Models
from autosft.scheduler.decide.history import Learned
from autosft.scheduler.decide.planner import divisors
from autosft.scheduler.plan import method_plan, remedies
from autosft.scheduler.plan.asked import Asked
from autosft.scheduler.plan.forecast import (
    Candidate,
    Forecast,
    Way,
    default_settings,
    fits,
    preferred_fitting,
    recipes,
)
from autosft.scheduler.plan.method_plan import (
    MethodPlan,
    pareto_front,
    plan_method,
    preferred,
    ways_worth_weighing,
)
from autosft.studies.trial import TrainingSettings
from tests.plans import memory_estimate
from tests.profiles.memory.models import config_json
from tests.scheduler.devices import gpu

pytestmark = pytest.mark.slow

MIB = 1 << 20
#: Large enough that weights and activations weigh more than the allocator's segments; none is ever made.
SHAPE = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
BATCH = 8


@cache
def small_model(tmp: str) -> ModelProfile:
    folder = Path(tmp)
    config = {**json.loads(config_json(**SHAPE)), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return load_model_profile(str(folder), need_tokenizer=False)


@pytest.fixture(scope="module")
def forecast(tmp_path_factory: pytest.TempPathFactory) -> Forecast:
    model = small_model(str(tmp_path_factory.mktemp("model")))
    return Forecast(Models(model, uniform))


def uniform(seq_len: int, _: int | None = None) -> LengthProfile:
    return LengthProfile(lengths=(seq_len,) * 64, scored=(seq_len,) * 64, max_length=seq_len)


def wanted(
    forecast: Forecast, method: Method = Method.FULL, *, seq_len: int = 256, batch: int = BATCH
) -> TrainingSettings:
    return default_settings(
        method, forecast.model, seq_len=seq_len, effective_batch_size=batch, num_train_examples=1000
    )


def with_free(num_bytes: int) -> DeviceProfile:
    return gpu(free_bytes=num_bytes)


def planned(forecast: Forecast, free_bytes: int, method: Method = Method.FULL) -> MethodPlan:
    return plan_method(wanted(forecast, method), with_free(free_bytes), forecast)


@pytest.mark.slow
def test_every_way_on_the_front_fits_and_pays_for_its_memory_with_speed(forecast: Forecast) -> None:
    plan = planned(forecast, 2 << 30)
    assert plan.chosen in plan.front
    for way in plan.front:
        assert way.micro_batch * way.gradient_accumulation * way.num_devices == BATCH
        assert way.memory.total_bytes <= 2 << 30
    for smaller, larger in zip(plan.front, plan.front[1:], strict=False):
        assert smaller.memory.total_bytes < larger.memory.total_bytes
        assert smaller.tokens_per_s < larger.tokens_per_s
    assert dict(plan.largest_micro_batches)[Checkpointing.OFF] == BATCH
    assert plan.remedies == ()


def test_larger_micro_batches_are_not_weighed_once_one_does_not_fit(
    forecast: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Checkpointing, int]] = []
    weigh = Forecast.weigh

    def noted(self: Forecast, one: Candidate, *where: Any) -> Way:
        asked.append((one.recipe.checkpointing, one.micro_batch))
        return weigh(self, one, *where)

    monkeypatch.setattr(Forecast, "weigh", noted)
    settings = wanted(forecast)
    everything = list(ways_worth_weighing(forecast.ways(settings, gpu(), 1), settings, gpu(), forecast))
    assert sorted(checkpoint.micro_batch for checkpoint in everything) == sorted(2 * divisors(BATCH))
    asked.clear()
    nothing = with_free(1)
    ends = list(ways_worth_weighing(forecast.ways(settings, nothing, 1), settings, nothing, forecast))
    assert len(ends) == len(asked) == 4
    assert {micro_batch for _, micro_batch in asked} == {1, BATCH}


@pytest.mark.slow
def test_where_nothing_fits_the_nearest_changes_that_would_are_named(
    forecast: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(free_bytes: int, method: Method = Method.FULL, seq_len: int = 2048) -> MethodPlan:
        return plan_method(wanted(forecast, method, seq_len=seq_len), with_free(free_bytes), forecast)

    monkeypatch.setattr(method_plan, "NUMS_DEVICES", (1,))
    full, lora = (asked(8 << 30, method).smallest for method in (Method.FULL, Method.LORA))
    shorter = asked(8 << 30, seq_len=1024).smallest
    assert lora.memory.total_bytes < full.memory.total_bytes
    assert shorter.memory.total_bytes < full.memory.total_bytes
    monkeypatch.setattr(remedies, "MORE_DEVICES", ())
    plan = asked(full.memory.total_bytes - 1)
    assert plan.front == ()
    assert plan.chosen is None
    changes = [remedy.change for remedy in plan.remedies]
    assert "--method lora" in changes
    assert "--seq-len 1024" in changes
    assert changes[-1] == "--hardware RTX-3050-Laptop"  # the smallest card of the table
    for remedy in plan.remedies:
        assert not remedy.way.memory.untraced


@pytest.mark.slow
def test_a_pruned_model_that_does_not_fit_is_offered_the_same_and_told_of_its_zeros(
    forecast: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method_plan, "NUMS_DEVICES", (1,))
    monkeypatch.setattr(remedies, "MORE_DEVICES", ())
    small = planned(forecast, 2 << 30, Method.SPARSE).smallest.memory.total_bytes - 1
    offered = {remedy.change: remedy for remedy in planned(forecast, small, Method.SPARSE).remedies}
    assert offered["--optimizer adamw_8bit"].fields == {
        "method": "sparse",
        "space": {"optimizer": "adamw_8bit"},
    }
    assert "--keep-zeros" in offered["--method lora"].quality
    assert offered["--memory lean"].fields == {"method": "sparse", "memory": "lean"}
    assert "measured: loss" in offered["--memory lean"].quality


@pytest.mark.slow
def test_ways_to_hold_what_is_trained_need_less_and_less(
    forecast: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method_plan, "NUMS_DEVICES", (1,))
    asked = Asked(memory="auto")
    plans = list(asked.plans(wanted(forecast), gpu(), forecast, 1))
    assert [plan.memory for plan in plans] == ["exact", "lean", "leanest"]
    assert [plan.precision for plan in plans[1:]] == [Precision.BF16_STOCHASTIC] * 2
    needs = [plan.smallest.memory.total_bytes for plan in plans]
    assert needs == sorted(needs, reverse=True)
    weights = forecast.model.num_parameters
    for plan, bits in zip(plans[1:], (8, 4), strict=True):
        parts = dict(plan.smallest.memory.components)
        assert parts["parameters"] == pytest.approx(2 * weights, rel=0.01)
        assert parts["optimizer state"] == pytest.approx(2 * weights * bits / 8, rel=0.05)
    old = replace(gpu(), supports_bf16=False)
    assert [plan.memory for plan in asked.plans(wanted(forecast), old, forecast, 1)] == ["exact"]


REFUSED = {
    "a lean way without bf16": (Asked(memory="lean"), {"supports_bf16": False}, "does not compute in bf16"),
    "rounding by an optimizer that cannot": (
        Asked(precision="bf16-stochastic"),
        {},
        "does not round stochastically",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_device_cannot_do_is_refused(name: str) -> None:
    asked, changes, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        asked.check((Method.FULL,), replace(gpu(), **changes), None)
    Asked().check((Method.FULL,), replace(gpu(), **changes), None)


@pytest.mark.slow
@pytest.mark.parametrize("free_mib", [500, 700, 1000, 2000])
@pytest.mark.parametrize("method", [Method.FULL, Method.LORA])
def test_a_study_takes_the_way_that_the_plan_says(forecast: Forecast, method: Method, free_mib: int) -> None:
    asked, device, models = wanted(forecast, method), with_free(free_mib * MIB), forecast.models
    said = plan_method(asked, device, forecast).chosen
    try:
        taken = planner.plan(
            asked,
            numerics.pin(asked, device),
            planner.Room(device=device, budget_bytes=usable_bytes(device)),
            models.costs,
        )
    except planner.DoesNotFitError:
        assert said is None
        return
    assert said is not None
    assert (taken.micro_batch, taken.checkpointing) == (said.micro_batch, said.checkpointing)
    assert taken.estimate == said.memory
    assert taken.predicted_duration_s == said.run_s


def test_what_trials_have_measured_moves_the_plan(forecast: Forecast) -> None:
    plain = planned(forecast, 2 << 30)
    assert plain.chosen is not None
    memory = plain.chosen.memory
    rows = tuple(
        CalibrationRow(fingerprint=memory.stack, predicted_bytes=100, measured_bytes=measured)
        for measured in range(105, 125)
    )
    learned = Forecast(Models(forecast.model, uniform, learned=Learned(memory=Calibration(rows=rows))))
    corrected = planned(learned, 2 << 30).chosen
    assert corrected is not None
    assert (corrected.micro_batch, corrected.checkpointing) == (
        plain.chosen.micro_batch,
        plain.chosen.checkpointing,
    )
    assert corrected.memory.num_calibration_rows == len(rows)
    assert corrected.memory.need.median_bytes > memory.need.median_bytes


def test_trials_of_a_kind_correct_the_speed_of_their_kind_alone(forecast: Forecast) -> None:
    def kind(method: Method) -> KindOfRun:
        return KindOfRun(
            model_fingerprint=forecast.model.fingerprint,
            device_name=gpu().name,
            num_threads=1,
            method=method,
            precision=numerics_module.pin_precision(gpu(), method),
        )

    rows = tuple(SpeedRow(kind=kind(Method.FULL), ratio=ratio) for ratio in (0.4, 0.5, 3.0))
    taught = Forecast(Models(forecast.model, uniform, learned=Learned(speed=MeasuredSpeeds(rows=rows))))
    for method, ratio in ((Method.FULL, 0.5), (Method.LORA, 1.0)):
        before, after = (planned(item, 8 << 30, method).chosen for item in (forecast, taught))
        assert before is not None
        assert after is not None
        assert after.tokens_per_s == pytest.approx(ratio * before.tokens_per_s)
        assert (after.speed_basis == "measured steps") is (ratio != 1.0)
        assert before.run_s < after.run_s < 2 * before.run_s if ratio != 1.0 else after.run_s == before.run_s


@pytest.mark.parametrize("method", [Method.LORA, Method.FULL])
def test_what_is_offered_is_what_the_plan_of_it_says(forecast: Forecast, method: Method) -> None:
    """The figures of "would fit" and of the table below it are of the same way to run."""
    device = with_free(4 << 30)
    asked = wanted(forecast, method)
    assert preferred_fitting(asked, device, 1, forecast) == plan_method(asked, device, forecast).chosen


def test_several_devices_divide_the_effective_batch(forecast: Forecast) -> None:
    both = list(recipes(wanted(forecast), forecast.pinned(wanted(forecast), gpu()), 2))
    assert {recipe.sharding for recipe, _ in both} == {Sharding.DDP, Sharding.FSDP}
    for recipe, micro_batch in both:
        assert micro_batch * recipe.gradient_accumulation * recipe.data_parallel == BATCH
    assert list(recipes(wanted(forecast), forecast.pinned(wanted(forecast), gpu()), 3)) == []
    assert preferred_fitting(wanted(forecast), with_free(2 << 30), 3, forecast) is None


def test_tied_embeddings_whose_rows_do_not_divide_are_not_split(forecast: Forecast) -> None:
    model = replace(forecast.model, has_tied_embeddings=True, vocab_size=159)
    tied = Forecast(Models(model, uniform))
    ways = {way.recipe.sharding: way for way in tied.ways(wanted(tied), gpu(), 2)}
    split, replicated = (
        tied.weigh(ways[item], wanted(tied), gpu()) for item in (Sharding.FSDP, Sharding.DDP)
    )
    assert "159 rows" in split.memory.refused
    assert not fits(split, gpu())
    assert fits(replicated, gpu())


def test_what_could_not_be_followed_is_never_said_to_fit(
    forecast: Forecast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cost_models, "estimate", lambda *_, **__: replace(memory_estimate(), untraced=("custom::op",))
    )
    plan = planned(Forecast(Models(forecast.model, uniform)), 80 << 30)
    assert plan.front == ()
    assert all(way is None for _, way in plan.by_num_devices)
    assert plan.remedies == ()


@pytest.mark.parametrize(
    ("kind", "precision", "has_bf16", "is_followed"),
    [
        (DeviceKind.CPU, Precision.FP32, False, True),
        (DeviceKind.CPU, Precision.BF16, False, False),
        (DeviceKind.CPU, Precision.BF16_AUTOCAST, False, False),
        (DeviceKind.CPU, Precision.BF16, True, True),
        (DeviceKind.CPU, Precision.BF16_AUTOCAST, True, True),
        (DeviceKind.CPU, Precision.BF16_STOCHASTIC, True, False),
        (DeviceKind.CUDA, Precision.BF16, True, True),
    ],
)
def test_16_bit_kernels_of_a_cpu_without_bf16_are_measured_and_never_said_to_fit(
    kind: DeviceKind,
    precision: Precision,
    has_bf16: bool,
    is_followed: bool,
    forecast: Forecast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They were predicted without what oneDNN compiles, and the trial ended at its cap."""
    monkeypatch.setattr(cost_models, "estimate", lambda *_, **__: memory_estimate())
    models = Models(forecast.model, uniform)
    recipe, micro_batch = next(recipes(wanted(forecast), forecast.pinned(wanted(forecast), gpu()), 1))
    recipe = replace(recipe, precision=precision)
    device = replace(gpu(), kind=kind, supports_bf16=has_bf16)
    found = models.estimate(recipe, micro_batch, 256, device)
    assert (found.untraced == ()) is is_followed
    assert ("--precision fp32" in found.way_out) is not is_followed


def test_cards_come_smallest_first(forecast: Forecast) -> None:
    devices = remedies.cards()
    sizes = [device.free_bytes for device in devices]
    assert sizes == sorted(sizes)
    assert len(devices) >= 16
    assert all(card.free_bytes > 24 << 30 for card in remedies.cards(above_bytes=24 << 30))


def test_a_lora_checkpoint_holds_its_adapters_alone(forecast: Forecast) -> None:
    full, lora = (planned(forecast, 2 << 30, method) for method in (Method.FULL, Method.LORA))
    assert full.num_trained == full.num_total == forecast.model.num_parameters
    # rank 16 on q, k, v, o, gate, up and down of 6 layers: 512, 256 and 1024 wide
    a_layer = 16 * ((512 + 512) * 2 + (512 + 256) * 2 + (512 + 1024) * 3)
    assert lora.num_trained == 6 * a_layer
    assert (full.saved_bytes, lora.saved_bytes) == (4 * full.num_total, 4 * lora.num_trained)


def test_the_chosen_way_is_the_smallest_that_is_nearly_as_fast(forecast: Forecast) -> None:
    way = planned(forecast, 2 << 30).front[-1]
    front = pareto_front(
        [
            replace(way, tokens_per_s=speed, memory=replace(way.memory, outside_bytes=outside))
            for speed, outside in ((100.0, 1), (130.0, 2), (120.0, 3), (133.0, 4))
        ]
    )
    assert [item.tokens_per_s for item in front] == [100.0, 130.0, 133.0]
    chosen = preferred(front)
    assert chosen is not None
    assert chosen.tokens_per_s == 130.0
    assert preferred(()) is None


# Properties of the real models


METHODS = st.sampled_from((Method.FULL, Method.LORA))
CHECKPOINTING = st.sampled_from((Checkpointing.OFF, Checkpointing.NON_REENTRANT))
LENGTHS = st.integers(16, 600)


#: Allocated memory only grows.  What a cap has to be is replayed: blocks fall into segments differently from
#: one size to the next, and a cap is looked for to 1/128, so that a larger batch may need 1.7 % less (seen).
NEED_SLACK = 0.06  # 4.2 % was seen, at micro batch 16 against 20 of a small model


def memory_of(
    forecast: Forecast, method: Method, checkpointing: Checkpointing, micro_batch: int, seq_len: int
) -> tuple[int, int]:
    """Return what is allocated and what is needed, with an effective batch of four micro batches."""
    asked = wanted(forecast, method, seq_len=seq_len, batch=micro_batch * 4)
    [one] = [
        candidate
        for candidate in forecast.ways(asked, gpu(), 1)
        if candidate.micro_batch == micro_batch and candidate.recipe.checkpointing is checkpointing
    ]
    memory = forecast.weigh(one, asked, gpu()).memory
    return memory.allocated.median_bytes, memory.need.median_bytes


@pytest.mark.slow
@hypothesis_settings(deadline=None, max_examples=20, derandomize=True)
@given(
    method=METHODS, checkpointing=CHECKPOINTING, seq_len=LENGTHS, sizes=st.tuples(*[st.integers(1, 24)] * 2)
)
def test_memory_grows_with_the_micro_batch(
    forecast: Forecast, method: Method, checkpointing: Checkpointing, seq_len: int, sizes: tuple[int, int]
) -> None:
    small, large = (memory_of(forecast, method, checkpointing, size, seq_len) for size in sorted(sizes))
    assert small[0] <= large[0]
    assert small[1] <= large[1] * (1 + NEED_SLACK)


@pytest.mark.slow
@hypothesis_settings(deadline=None, max_examples=20, derandomize=True)
@given(
    method=METHODS,
    checkpointing=CHECKPOINTING,
    micro_batch=st.integers(1, 8),
    lengths=st.tuples(LENGTHS, LENGTHS),
)
def test_memory_grows_with_the_length(
    forecast: Forecast,
    method: Method,
    checkpointing: Checkpointing,
    micro_batch: int,
    lengths: tuple[int, int],
) -> None:
    short, long = (
        memory_of(forecast, method, checkpointing, micro_batch, length) for length in sorted(lengths)
    )
    assert short[0] <= long[0]
    assert short[1] <= long[1] * (1 + NEED_SLACK)


@hypothesis_settings(deadline=None, max_examples=20, derandomize=True)
@given(method=METHODS, smaller=st.integers(300, 1500), more=st.integers(0, 1500))
def test_a_larger_budget_never_removes_a_way(
    forecast: Forecast, method: Method, smaller: int, more: int
) -> None:
    asked = wanted(forecast, method)
    ways = [forecast.weigh(way, asked, gpu()) for way in forecast.ways(asked, gpu(), 1)]
    kept, others = (
        [way for way in ways if fits(way, with_free(budget * MIB))] for budget in (smaller, smaller + more)
    )
    assert all(item in others for item in kept)
    for num_devices in (1, 2):
        first = preferred_fitting(asked, with_free(smaller * MIB), num_devices, forecast)
        second = preferred_fitting(asked, with_free((smaller + more) * MIB), num_devices, forecast)
        if first is not None:
            assert second is not None
            assert second.tokens_per_s * planner.WORTHWHILE_SPEEDUP >= first.tokens_per_s
