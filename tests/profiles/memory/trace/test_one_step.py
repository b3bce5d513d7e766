"""A program from traces of one optimizer step is the program from traces of two."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory import program_cache
from autosft.profiles.memory.program.blocks import Birth, Owner, Phase, Segment, Trace
from autosft.profiles.memory.program.program import Program, Shape
from autosft.profiles.memory.trace import tracing
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method
from tests.profiles.memory.models import config_json, step_recipe
from tests.sampling import every

pytestmark = pytest.mark.slow

LORA = {"method": Method.LORA, "adapter": AdapterSettings(rank=4, alpha=8.0, targets="all-linear")}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "two kinds of layers": {"model_type": "gemma3_text", "sliding_window": 512, "num_hidden_layers": 12},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, accumulated": {"gradient_accumulation": 2},
    "LoRA, accumulated": {**LORA, "gradient_accumulation": 2},
    "checkpointing": {"checkpointing": Checkpointing.NON_REENTRANT, "gradient_accumulation": 2},
    "8-bit moments": {"optimizer": "adamw_8bit"},
    "adafactor": {"optimizer": "adafactor"},
}
KINDS = {DeviceKind.CUDA: "CUDA", DeviceKind.CPU: "CPU"}


def program(config: str, recipe: dict[str, Any], kind: DeviceKind) -> Program:
    program_cache._step_programs.cache_clear()
    programs = program_cache.step_programs(
        config, step_recipe(**recipe), kind, None, trusted=False, cache_dir=None
    )
    shape = Shape(batch=2, seq=40, scored=30)
    return programs._trace(tracing.Regime.of(shape, padded=True, window=programs._window()))


@pytest.mark.parametrize(
    ("config", "recipe", "kind"),
    every(
        5,  # prime to the numbers of each, so that the sample has all of them
        itertools.product(CONFIGS.values(), RECIPES.values(), KINDS),
        map(" ".join, itertools.product(CONFIGS, RECIPES, KINDS.values())),
    ),
)
def test_one_step_gives_the_program_of_two(
    config: dict[str, Any], recipe: dict[str, Any], kind: DeviceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = config_json(**config)
    short = program(text, recipe, kind)
    monkeypatch.setattr(tracing, "_program_of_one_step", lambda *_: None)
    whole = program(text, recipe, kind)
    assert list(short.segments) == list(whole.segments)
    for name, segment in whole.segments.items():
        same = short.segments[name]
        assert np.array_equal(same.coefficients, segment.coefficients), name
        for field in ("events", "phases", "births", "survivors", "ends"):
            assert getattr(same, field) == getattr(segment, field), (name, field)


def test_the_shortcut_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    usual = tracing._program_of_one_step

    def noted(*arguments: Any) -> Program | None:
        taken.append(usual(*arguments))
        return taken[-1]

    monkeypatch.setattr(tracing, "_program_of_one_step", noted)
    program(config_json(), {}, DeviceKind.CUDA)
    assert taken[0] is not None


def birth(size: int, owner: Owner = Owner.ACTIVATION) -> Birth:
    return Birth(size, "aten::mm", Phase.FORWARD, 0, owner)


def segment(name: str, *events: int) -> Segment:
    return Segment(name, list(events), [0] * len(events), [Phase.FORWARD] * len(events))


def two_steps(second: Birth, *ended: int) -> Trace:
    """Return a trace of two steps that each make one gradient, block 1 and block 3."""
    return Trace(
        births=(birth(8), birth(4), birth(2), second, birth(1)),
        segments=(
            segment("setup", 0),
            segment("micro", 1),
            segment("update first", 2, ~1),
            segment("micro", 3, *ended),
            segment("update", ~3),
            segment("evaluate", 4, ~4),
        ),
        untraced=(),
    )


def test_the_second_step_is_left_out() -> None:
    short = two_steps(birth(4)).with_one_step()
    assert short is not None
    assert [(part.name, part.events) for part in short.segments] == [
        ("setup", [0]), ("micro", [1]), ("update first", [2, ~1]), ("update", [~1]), ("evaluate", [3, ~3]),
    ]  # fmt: skip
    assert [one.size for one in short.births] == [8, 4, 2, 1]


@pytest.mark.parametrize(
    "trace",
    [
        two_steps(birth(5)),
        two_steps(birth(4, Owner.GRADIENT)),
        two_steps(birth(4), ~2),
        Trace((birth(8),), (segment("setup", 0),), ()),
    ],
    ids=["another size", "another owner", "something ends", "no step"],
)
def test_a_second_step_that_differs_is_kept(trace: Trace) -> None:
    assert trace.with_one_step() is None
