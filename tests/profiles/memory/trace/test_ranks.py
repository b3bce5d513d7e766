"""One rank of several, traced alone, against real ranks over gloo, by the bytes of live tensors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.batches import Batch
from autosft.profiles.memory.program.blocks import Owner
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.memory.program.run import Run
from autosft.profiles.memory.program_cache import step_programs
from autosft.profiles.memory.sharding import coalesced, sharded
from autosft.profiles.recipe import (
    AdapterSettings,
    Checkpointing,
    Method,
    Precision,
    Sharding,
    StepRecipe,
)
from tests.profiles.memory.models import config_json, step_recipe

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from benchmarks.real_ranks import real_peaks  # noqa: E402 - needs torch
from benchmarks.real_step import traced_peak_bytes  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")

SIZES = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 352, "head_dim": 32}
SHAPE = Shape(batch=2, seq=120, scored=2 * 119)
LORA = {"method": Method.LORA, "adapter": AdapterSettings(rank=4, alpha=8, targets="all-linear")}
BF16 = {"precision": Precision.BF16}
FP32 = {"precision": Precision.FP32}

CASES: dict[str, dict[str, Any]] = {
    "bf16, gradients reduced in fp32": BF16,
    "fp32": FP32,
    "not clipped": {**BF16, "max_grad_norm": 0.0},
    "fused AdamW": {**BF16, "optimizer": "adamw_torch_fused"},
    "accumulated: whole gradients until the last micro batch": {**BF16, "gradient_accumulation": 2},
    "checkpointed": {**BF16, "checkpointing": Checkpointing.NON_REENTRANT},
    "checkpointed, reentrant": {**FP32, "checkpointing": Checkpointing.REENTRANT},
    "autocast, checkpointed, accumulated": {
        "precision": Precision.BF16_AUTOCAST,
        "checkpointing": Checkpointing.NON_REENTRANT,
        "gradient_accumulation": 2,
    },
    "LoRA, replicated over sharded weights": {**BF16, **LORA},
}
#: Ranks, and changes of the model's configuration.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "tied embeddings": (2, {"tie_word_embeddings": True}),
    "rows that do not divide: shards are padded": (3, {"vocab_size": 2003, "intermediate_size": 353}),
    "Qwen 3": (2, {"model_type": "qwen3"}),
}


def recipe_of(case: dict[str, Any], num_ranks: int = 2, sharding: Sharding = Sharding.FSDP) -> StepRecipe:
    values = {"optimizer": "adamw_torch", **case}
    return step_recipe(sharding=sharding, data_parallel=num_ranks, **values)


def config(num_layers: int = 3, **changes: Any) -> str:
    return config_json(**{**SIZES, "num_hidden_layers": num_layers, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_traced_rank_holds_what_a_real_one_does(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(CASES[name])
    traced, _ = traced_peak_bytes(config(), recipe, SHAPE)
    assert traced == pytest.approx(max(real_peaks(config(), recipe, SHAPE, tmp_path)), abs=4096)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_any_model_is_sharded_as_transformers_does(name: str, tmp_path: Path) -> None:
    num_ranks, changes = MODELS[name]
    recipe = recipe_of(BF16, num_ranks)
    traced, _ = traced_peak_bytes(config(**changes), recipe, SHAPE)
    assert traced == pytest.approx(max(real_peaks(config(**changes), recipe, SHAPE, tmp_path)), abs=4096)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["fp32", "bf16, gradients reduced in fp32", "LoRA, replicated over sharded weights"]
)
def test_replicas_hold_their_gradients_twice(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(CASES[name], sharding=Sharding.DDP)
    real = max(real_peaks(config(), recipe, SHAPE, tmp_path))
    assert peak_of(config(), recipe) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("name", [name for name in CASES if "accumulated" not in name])
def test_a_program_of_a_few_layers_is_the_rank_at_full_depth(name: str) -> None:
    recipe = recipe_of(CASES[name])
    traced, _ = traced_peak_bytes(config(6), recipe, SHAPE)
    programs = step_programs(config(6), recipe, DeviceKind.CPU, None, trusted=False, cache_dir=None)
    assert programs.num_layers == (3, 6)
    assert peak_of(config(6), recipe) == pytest.approx(traced, rel=0.002)  # blocks are rounded up to 512 B


def peak_of(model: str, recipe: StepRecipe) -> int:
    programs = step_programs(model, recipe, DeviceKind.CPU, None, trusted=False, cache_dir=None)
    batch = programs.as_scored(Batch(shape=SHAPE, padded=False))
    program = programs.for_batch(batch)
    names = ("setup", "micro", "update first", "micro", "update", "evaluate")
    return Run(
        [(program.segments[name], SHAPE) for name in names], sharded(program, recipe)
    ).allocated_bytes()


def test_accumulating_ranks_hold_whole_gradients() -> None:
    """Trainer reduces gradients after the last micro batch: until then a shard saves nothing of them."""
    once, twice = (
        step_programs(
            config(),
            recipe_of({**BF16, "gradient_accumulation": count}),
            DeviceKind.CUDA,
            (8, 0),
            trusted=False,
            cache_dir=None,
        )
        for count in (1, 2)
    )
    batch = Batch(shape=SHAPE, padded=False)

    def gradients(program: Any, segment: str) -> int:
        compiled = program.segments[segment]
        sizes = compiled.sizes_at(SHAPE)
        return sum(
            sizes[local] for local, _ in compiled.survivors if compiled.births[local].owner is Owner.GRADIENT
        )

    shard = gradients(once.for_batch(batch), "micro")
    assert gradients(twice.for_batch(batch), "micro") == pytest.approx(2 * 2 * shard, rel=0.02)  # fp32, whole
    assert gradients(twice.for_batch(batch), "micro next") == pytest.approx(shard, rel=0.02)


BUCKETS = {
    "a bucket is full when it reaches its limit": ([3, 3, 3, 3], (5,), [[3, 3], [3, 3]]),
    "the first one is smaller": ([3, 3, 3, 3], (1, 5), [[3], [3, 3], [3]]),
    "a large tensor fills the bucket that it comes into": ([1, 30, 1], (5,), [[1, 30], [1]]),
    "nothing": ([], (5,), []),
}


@pytest.mark.parametrize("name", BUCKETS)
def test_tensors_are_put_into_buckets_as_torch_does(name: str) -> None:
    sizes, limits, expected = BUCKETS[name]
    assert coalesced(sizes, limits) == expected
    if sizes:
        tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        assigned, _ = torch.distributed._compute_bucket_assignment_by_size(tensors, list(limits))
        assert [[sizes[index] for index in bucket] for bucket in assigned] == expected
