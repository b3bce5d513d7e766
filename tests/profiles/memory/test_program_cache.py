"""Programs are made once: which of them serves which step."""

from __future__ import annotations

from typing import Any

import pytest

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.batches import Batch
from autosft.profiles.memory.program.program import CompiledSegment, Program, Shape
from autosft.profiles.memory.program_cache import StepPrograms, step_programs
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method, Precision
from tests.profiles.memory.models import config_json, step_recipe

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

LORA = AdapterSettings(rank=4, alpha=8, targets=("q_proj", "v_proj"), dropout=0.1)
CHECKPOINTED = {"method": Method.LORA, "adapter": LORA, "checkpointing": Checkpointing.NON_REENTRANT}
RECIPES: list[tuple[str, dict[str, Any], DeviceKind]] = [
    ("full under autocast", {"precision": Precision.BF16_AUTOCAST}, DeviceKind.CUDA),
    ("lora, checkpointing", CHECKPOINTED, DeviceKind.CUDA),
    ("on the CPU", {"precision": Precision.FP32, "optimizer": "adamw_torch"}, DeviceKind.CPU),
]


def programs_of(recipe: dict[str, Any], kind: DeviceKind, accumulation: int, layers: int = 4) -> StepPrograms:
    config = config_json(num_hidden_layers=layers)
    return step_programs(
        config,
        step_recipe(**recipe, gradient_accumulation=accumulation),
        kind,
        (8, 0),
        trusted=False,
        cache_dir=None,
    )


def batch_of(programs: StepPrograms) -> Batch:
    return programs.as_scored(Batch(shape=Shape(batch=2, seq=100, scored=50), padded=True))


def what_it_does(segment: CompiledSegment) -> tuple[Any, ...]:
    return (
        segment.events,
        segment.phases,
        segment.coefficients.tolist(),
        segment.births,
        segment.survivors,
        segment.ends,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kind"), [recipe[1:] for recipe in RECIPES], ids=[recipe[0] for recipe in RECIPES]
)
def test_accumulation_has_in_it_the_step_without(
    recipe: dict[str, Any], kind: DeviceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = programs_of(recipe, kind, 1)
    batch = batch_of(alone)
    monkeypatch.setattr(StepPrograms, "_of_accumulation", lambda *_: None)
    traced = alone.for_batch(batch)
    accumulated = programs_of(recipe, kind, 4).for_batch(batch)
    assert set(accumulated.segments) - set(traced.segments) == {"micro next"}
    for name, segment in traced.segments.items():
        assert what_it_does(segment) == what_it_does(accumulated.segments[name]), name


def test_a_step_without_accumulation_is_not_traced_where_one_with_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe: dict[str, Any] = {"precision": Precision.BF16}
    accumulated = programs_of(recipe, DeviceKind.CUDA, 2, layers=5)
    batch = batch_of(accumulated)
    made = accumulated.for_batch(batch)

    def refuse(*_: Any) -> Program:
        pytest.fail("traced again")

    monkeypatch.setattr(StepPrograms, "_make", refuse)
    assert programs_of(recipe, DeviceKind.CUDA, 1, layers=5).for_batch(batch) is made
