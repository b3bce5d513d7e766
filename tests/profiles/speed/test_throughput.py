"""Predicted speed: sums, monotony, what multi-GPU costs, calibration, and published rows."""

from __future__ import annotations

import itertools
import json
import os
import random
import runpy
import statistics
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.hardware.host import profile_host
from autosft.profiles.hardware.known_devices import cluster_from_name
from autosft.profiles.model.profile import ModelProfile, load_model_profile
from autosft.profiles.recipe import (
    AdapterSettings,
    Checkpointing,
    LengthProfile,
    Method,
    Precision,
    Sharding,
    StepRecipe,
)
from autosft.profiles.speed.throughput import (
    ThroughputEstimate,
    like_measured,
    mean_longest,
    mean_padded,
    predict_evaluation_s,
    predict_generation_s,
    predict_step_s,
)

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("AUTOSFT_SHARED", ROOT.parent / "shared"))

FULL = StepRecipe(
    method=Method.FULL,
    adapter=None,
    precision=Precision.BF16,
    optimizer="adamw_torch_fused",
    checkpointing=Checkpointing.OFF,
    attention="sdpa",
)
LORA = replace(
    FULL, method=Method.LORA, adapter=AdapterSettings(rank=16, alpha=32, targets=("q_proj", "v_proj"))
)


@cache
def model(name: str = "SmolLM2-135M") -> ModelProfile:
    return load_model_profile(name, need_tokenizer=False)


@cache
def device(name: str = "A100-80GB") -> DeviceProfile:
    return cluster_from_name(name).devices[0]


def lengths(*values: int) -> LengthProfile:
    return LengthProfile(lengths=values, scored=tuple(v // 2 for v in values), max_length=max(values))


def predict(
    recipe: StepRecipe = FULL,
    *,
    micro_batch: int = 8,
    length: int = 512,
    name: str = "Llama-3.2-1B",
    on: DeviceProfile | None = None,
) -> ThroughputEstimate:
    return predict_step_s(model(name), recipe, micro_batch, lengths(length), on or device())


def test_parts_add_up_and_the_largest_is_named() -> None:
    estimate = predict(replace(FULL, gradient_accumulation=4))
    assert sum(seconds for _, seconds in estimate.parts) == pytest.approx(estimate.step_s)
    assert dict(estimate.parts)[estimate.what_bounds] == max(seconds for _, seconds in estimate.parts)
    assert estimate.upper_step_s > estimate.step_s
    assert estimate.tokens_per_s == pytest.approx(8 * 4 * 512 / estimate.step_s)


@pytest.mark.parametrize("name", ["A100-80GB", "V100-32GB"])
def test_rows_without_padding_cost_what_their_own_tokens_do(name: str) -> None:
    def step_s(micro_batch: int, data: LengthProfile, *, padding_free: bool) -> float:
        recipe = replace(FULL, precision=Precision.FP16_AUTOCAST, padding_free=padding_free)
        return predict_step_s(model("Llama-3.2-1B"), recipe, micro_batch, data, device(name)).step_s

    alike, mixed = lengths(*[512] * 64), lengths(*[64, 128, 320, 1536] * 16)  # of 512 on average
    row, padded = (step_s(8, alike, padding_free=item) for item in (True, False))
    assert 0.9 * padded < row <= padded, "there the mask is all that is saved"
    assert step_s(8, mixed, padding_free=True) < 0.6 * step_s(8, mixed, padding_free=False)
    assert row < step_s(8, mixed, padding_free=True) < 1.2 * row, "attention sees squares of lengths"
    assert step_s(1, mixed, padding_free=True) >= step_s(1, lengths(512), padding_free=False)


@settings(max_examples=40, deadline=None)
@given(
    micro_batch=st.integers(1, 32),
    length=st.integers(16, 4096),
    more=st.integers(1, 16),
    recipe=st.sampled_from([FULL, LORA, replace(FULL, precision=Precision.BF16_AUTOCAST)]),
)
def test_more_work_takes_at_least_as_long(
    micro_batch: int, length: int, more: int, recipe: StepRecipe
) -> None:
    base = predict(recipe, micro_batch=micro_batch, length=length).step_s * (1 - 1e-9)
    # Tiles and waves make a product's time a staircase that may step down a little: 25 % of slack.
    assert predict(recipe, micro_batch=micro_batch + more, length=length).step_s > 0.75 * base
    assert predict(recipe, micro_batch=2 * micro_batch, length=length).step_s >= base
    assert predict(recipe, micro_batch=micro_batch, length=2 * length).step_s >= base
    slower = predict(
        replace(recipe, checkpointing=Checkpointing.NON_REENTRANT), micro_batch=micro_batch
    ).step_s
    assert slower >= predict(recipe, micro_batch=micro_batch).step_s


@pytest.mark.parametrize(
    ("case", "faster", "slower"),
    [
        ("LoRA has no weight gradients", LORA, FULL),
        ("fused AdamW reads less", FULL, replace(FULL, optimizer="adamw_torch")),
        ("16 bits against 32", FULL, replace(FULL, precision=Precision.FP32)),
        ("eager attention is quadratic in memory", FULL, replace(FULL, attention="eager")),
        ("one micro step against four", FULL, replace(FULL, gradient_accumulation=4)),
    ],
)
def test_twins(case: str, faster: StepRecipe, slower: StepRecipe) -> None:
    assert predict(faster, length=2048).step_s < predict(slower, length=2048).step_s, case


def test_small_models_wait_for_python_and_large_ones_do_not() -> None:
    small = predict(name="SmolLM2-135M", micro_batch=1, length=128)
    large = predict(name="Llama-3.1-8B", micro_batch=8, length=2048)
    assert small.what_bounds == "launching kernels"
    assert large.what_bounds == "matrix products"


def test_nvlink_scales_and_pcie_waits() -> None:
    def scaling(sharding: Sharding, link: float) -> float:
        on = replace(device(), link_bytes_per_s=link, host_link_bytes_per_s=31.5e9)
        recipe = replace(FULL, sharding=sharding, data_parallel=4)
        many = predict(recipe, micro_batch=2, length=1024, name="Llama-2-7b", on=on)
        one = predict(micro_batch=2, length=1024, name="Llama-2-7b", on=on)
        return many.tokens_per_s / one.tokens_per_s

    assert 3 < scaling(Sharding.DDP, 300e9) <= 4
    assert scaling(Sharding.DDP, 31.5e9) < scaling(Sharding.DDP, 300e9)
    assert scaling(Sharding.FSDP, 31.5e9) < 3
    assert dict(predict().parts)["communication between GPUs"] == 0


def test_shards_are_gathered_as_they_are_kept_and_adapters_are_not_sharded() -> None:
    on = replace(device(), link_bytes_per_s=20e9)

    def parts(**changes: object) -> dict[str, float]:
        recipe = replace(FULL, sharding=Sharding.FSDP, data_parallel=4, **changes)
        return dict(predict(recipe, name="Llama-2-7b", on=on).parts)

    def sent(**changes: object) -> float:
        return parts(**changes)["communication between GPUs"]

    fp32, bf16 = sent(precision=Precision.BF16_AUTOCAST), sent(precision=Precision.BF16)
    assert fp32 == pytest.approx(2 * bf16, rel=0.4)  # autocast casts after the gathering
    again = sent(precision=Precision.BF16, gradient_accumulation=3)
    assert 1.5 * bf16 < again < 2.5 * bf16  # gradients are reduced once
    lora = {"method": Method.LORA, "adapter": AdapterSettings(rank=16, alpha=32.0, targets="all-linear")}
    alone = dict(predict(replace(FULL, **lora), name="Llama-2-7b", on=on).parts)
    assert parts(**lora)["optimizer"] == alone["optimizer"]


def test_full_fine_tuning_on_several_cards_is_slower_than_lora() -> None:
    on = replace(device(), link_bytes_per_s=300e9)
    shared = {"data_parallel": 4, "precision": Precision.BF16_AUTOCAST}
    full = predict(replace(FULL, sharding=Sharding.FSDP, **shared), micro_batch=2, name="Llama-2-7b", on=on)
    adapter = AdapterSettings(rank=16, alpha=32.0, targets="all-linear")
    recipe = replace(
        FULL,
        method=Method.LORA,
        adapter=adapter,
        sharding=Sharding.DDP,
        data_parallel=4,
        precision=Precision.BF16,
    )
    lora = predict(recipe, micro_batch=2, name="Llama-2-7b", on=on)
    assert full.tokens_per_s < 0.75 * lora.tokens_per_s


def test_a_measured_all_reduce_counts_before_the_links() -> None:
    recipe = replace(FULL, sharding=Sharding.DDP, data_parallel=4)
    on = replace(device(), link_bytes_per_s=300e9)
    slowed = replace(on, all_reduce_bytes_per_s=2e9)  # as where peers cannot reach each other's memory
    assert predict(recipe, on=slowed).step_s > 1.5 * predict(recipe, on=on).step_s


def test_communication_is_named_when_it_rules() -> None:
    slow = replace(device(), link_bytes_per_s=4e9, host_link_bytes_per_s=4e9)
    recipe = replace(FULL, sharding=Sharding.FSDP, data_parallel=2)
    assert predict(recipe, micro_batch=1, length=256, on=slow).what_bounds == "communication between GPUs"


def test_cpu_threads_share_the_machine() -> None:
    host = replace(profile_host(), num_cores=4, matmul_flops_per_s=2e11, memory_bytes_per_s=4e10)
    fp32 = replace(FULL, precision=Precision.FP32)
    one = predict_step_s(model(), fp32, 4, lengths(128), host, num_threads=1)
    four = predict_step_s(model(), fp32, 4, lengths(128), host, num_threads=4)
    assert 2 < one.step_s / four.step_s <= 4
    unknown = replace(host, matmul_flops_per_s=None, memory_bytes_per_s=None)
    assert predict_step_s(model(), fp32, 4, lengths(128), unknown).basis == "assumed rates"


def test_a_prediction_follows_what_trials_of_its_kind_have_measured() -> None:
    cold = predict()
    warm = like_measured(cold, 0.5)
    assert warm.step_s == pytest.approx(2 * cold.step_s)
    assert cold.step_s < warm.step_s < warm.upper_step_s < 2 * cold.upper_step_s
    assert warm.tokens_per_s == pytest.approx(8 * 512 / warm.step_s)
    assert sum(seconds for _, seconds in warm.parts) == pytest.approx(warm.step_s)
    assert warm.basis == "measured steps"


@given(values=st.lists(st.integers(1, 100), min_size=1, max_size=6), batch=st.integers(1, 6))
def test_mean_longest_is_the_mean_over_all_batches(values: list[int], batch: int) -> None:
    batches = list(itertools.combinations(values, min(batch, len(values))))
    assert mean_longest(values, batch) == pytest.approx(statistics.mean(max(batch) for batch in batches))


def test_evaluation_costs_less_than_training_and_generation_grows() -> None:
    data = lengths(*[256] * 64)
    evaluation = predict_evaluation_s(model("Llama-3.2-1B"), Precision.BF16, 8, data, device())
    assert 0 < evaluation < 8 * predict(length=256).step_s

    def predicted_s(num_new_tokens: int) -> float:
        return predict_generation_s(
            model(), Precision.BF16, device(), batch=8, prompt_length=128, num_new_tokens=num_new_tokens
        )

    assert predicted_s(128) > 1.5 * predicted_s(64)


# Qwen's README: Qwen-7B (Llama-2-7b's shape), LoRA of rank 64 on all linear layers, checkpointing, batch 1,
# 8 accumulation steps, one A100-SXM4-80GB; seconds an iteration by length.
QWEN_7B_LORA_S = {512: 1.5, 1024: 2.8, 2048: 5.2, 4096: 10.1, 8192: 21.3}


def test_published_lora_on_an_a100() -> None:
    recipe = replace(
        FULL,
        method=Method.LORA,
        adapter=AdapterSettings(rank=64, alpha=16, targets="all-linear"),
        checkpointing=Checkpointing.REENTRANT,
        gradient_accumulation=8,
    )
    for length, measured in QWEN_7B_LORA_S.items():
        predicted = predict(recipe, micro_batch=1, length=length, name="Llama-2-7b").step_s
        assert abs(predicted / measured - 1) < 0.15, length


def test_published_rows_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = SHARED / "measurements" / "published_times_dev.jsonl"
    if not rows.is_file():
        pytest.skip(f"{rows} is not here (set AUTOSFT_SHARED)")
    script, out = ROOT / "benchmarks" / "throughput_accuracy.py", tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", [str(script), "--rows", str(rows), "--json", str(out)])
    runpy.run_path(str(script), run_name="__main__")
    errors = [abs(load["relative_error"]) for load in json.loads(out.read_text())]
    assert statistics.median(errors) < 0.15


@pytest.mark.parametrize(("micro_batch", "accumulation", "data_parallel"), [(4, 8, 1), (2, 8, 2), (8, 2, 1)])
def test_the_padding_of_sorted_steps_is_that_of_many_drawn_ones(
    micro_batch: int, accumulation: int, data_parallel: int
) -> None:
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(5, 0.8)) + 2 for _ in range(2000)]
    per_step = micro_batch * accumulation * data_parallel
    drawn = []
    for _ in range(3000):
        step = sorted(rng.sample(lengths, per_step), reverse=True)
        drawn += step[::micro_batch]
    recipe = replace(FULL, sorts_steps=True, gradient_accumulation=accumulation, data_parallel=data_parallel)
    assert mean_padded(lengths, recipe, micro_batch) == pytest.approx(statistics.mean(drawn), rel=0.03)
    assert mean_padded(lengths, recipe, micro_batch) < mean_longest(lengths, micro_batch)
