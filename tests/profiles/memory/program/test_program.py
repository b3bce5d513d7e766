from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.memory.allocator.caching_allocator import (
    CachingAllocator,
    rounded_bytes,
)
from autosft.profiles.memory.allocator.options import AllocatorOptions
from autosft.profiles.memory.program.blocks import Segment, Trace
from autosft.profiles.memory.program.program import (
    CompiledSegment,
    NotPolynomial,
    Program,
    Shape,
    features,
    solve_sizes,
)
from autosft.profiles.memory.program.replay import Replay
from autosft.profiles.memory.program.run import Run
from autosft.profiles.recipe import AdapterSettings, Checkpointing, Method, Precision
from tests.profiles.memory.models import config_json, step_recipe

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

LORA = AdapterSettings(rank=4, alpha=8, targets=("q_proj", "v_proj"), dropout=0.1)


@dataclass(frozen=True)
class Case:
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    padded: bool = True
    kind: DeviceKind = DeviceKind.CUDA
    row: bool = False


CASES = [
    Case("full, no padding", padded=False),
    Case("full, padded"),
    Case("full on the CPU", {"precision": Precision.FP32, "optimizer": "adamw_torch"}, kind=DeviceKind.CPU),
    Case("lora with dropout", {"method": Method.LORA, "adapter": LORA}),
    Case("qlora", {"method": Method.QLORA, "adapter": LORA, "optimizer": "paged_adamw_8bit"}),
    Case(
        "autocast and checkpointing, accumulated",
        {
            "precision": Precision.BF16_AUTOCAST,
            "checkpointing": Checkpointing.NON_REENTRANT,
            "gradient_accumulation": 2,
        },
    ),
    Case(
        "reentrant checkpointing, foreach",
        {"checkpointing": Checkpointing.REENTRANT, "optimizer": "adamw_torch"},
    ),
    Case("eager attention, 8-bit", {"attention": "eager", "optimizer": "adamw_8bit"}),
    Case(
        "sliding and full layers",
        model={"model_type": "gemma3_text", "num_hidden_layers": 8, "sliding_window": 512},
        padded=False,
    ),
    Case("a row", {"padding_free": True}, padded=False, row=True),
    Case(
        "a row under autocast",
        {"padding_free": True, "precision": Precision.BF16_AUTOCAST},
        padded=False,
        row=True,
    ),
    Case(
        "a row on the CPU",
        {"padding_free": True, "precision": Precision.FP32, "optimizer": "adamw_torch"},
        padded=False,
        kind=DeviceKind.CPU,
        row=True,
    ),
]


def direct_and_program(case: Case, shape: Shape) -> tuple[Trace, Program]:
    """Trace a model at its full depth at one shape, and make the program from shallow ones."""
    from autosft.profiles.memory.trace.shallow_model import load_config, shallow_model
    from autosft.profiles.memory.trace.tracing import Regime, program_of, trace
    from autosft.profiles.memory.trace.trainer_step import target_of, trainer_loop

    recipe = step_recipe(**case.recipe)
    config = config_json(**case.model)
    all_scored = case.kind is DeviceKind.CPU
    target = target_of(recipe, case.kind, (8, 0))
    shallow = shallow_model(config)
    assert len(shallow.layer_kinds) > shallow.config.num_hidden_layers, "nothing to extend"
    program = program_of(
        trainer_loop(shallow.config, recipe, case.kind, trust_remote_code=False),
        Regime.of(shape, padded=case.padded, window=shallow.window),
        target=target,
        layer_kinds=shallow.layer_kinds,
        all_scored=all_scored,
        window=shallow.window,
    )
    deep = trainer_loop(load_config(config), recipe, case.kind, trust_remote_code=False)
    return trace(deep, shape, padded=case.padded, target=target), program


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_program_equals_a_trace_at_full_depth_event_by_event(case: Case) -> None:
    shape = Shape(batch=3, seq=333, scored=222, is_row=case.row)
    if case.kind is DeviceKind.CPU:
        shape = replace(shape, scored=shape.num_predicted)
    traced, program = direct_and_program(case, shape)
    last = {segment.name: segment for segment in traced.segments}
    assert set(program.segments) == set(last)
    for name, segment in program.segments.items():
        expected = events_of_trace(traced, last[name])
        got = events_of_program(segment, shape)
        assert len(expected) == len(got), name
        differences = [(a, b) for a, b in zip(expected, got, strict=True) if a != b]
        # norms of all gradients are stacked in one block of a few bytes, whose size depends on the depth
        assert all(a[0] == b[0] == "birth" and max(a[1], b[1]) <= 4096 for a, b in differences), name
        assert len(differences) <= 1, name


def events_of_trace(traced: Trace, segment: Segment) -> list[tuple[str, int]]:
    local: dict[int, int] = {}
    events = []
    for event in segment.events:
        if event >= 0:
            local[event] = len(local)
            events.append(("birth", rounded_bytes(traced.births[event].size)))
        else:
            events.append(("death", local.get(~event, -1)))
    return events


def events_of_program(segment: CompiledSegment, shape: Shape) -> list[tuple[str, int]]:
    sizes = segment.sizes_at(shape)
    return [
        ("birth", sizes[event]) if event >= 0 else ("death", ~event if ~event < len(sizes) else -1)
        for event in segment.events
    ]


def test_live_bytes_and_replay_agree_and_steps_end_where_they_began() -> None:
    shape = Shape(batch=3, seq=333, scored=222)
    _, program = direct_and_program(Case("padded"), shape)
    names = ("setup", "micro", "update first", "micro", "update", "micro", "update")
    run = Run([(program.segments[name], shape) for name in names])
    replay = Replay(CachingAllocator())
    for name in names:
        replay.run(program.segments[name], shape)
    after = run.live_bytes()
    # the head's tile has a segment of its own, rounded to 2 MiB, and keeps a remainder of up to 1 MiB
    peak = run.allocated_bytes()
    assert peak <= replay.allocator.peak_allocated_bytes <= peak + (1 << 20)
    assert replay.allocator.allocated_bytes == after[-1]
    assert run.peak().allocated_bytes == sum(run.peak().by_owner.values()) == peak
    replayed = run.replay(AllocatorOptions())
    assert replayed.allocated_bytes == replay.allocator.peak_allocated_bytes
    assert replayed.reserved_bytes == replay.allocator.peak_reserved_bytes
    assert after[2] == after[4] == after[6] > after[0]


def test_sizes_that_are_no_polynomial_are_refused() -> None:
    shapes = [
        Shape(batch=b, seq=s, scored=n) for b, s, n in [(2, 97, 11), (3, 211, 17), (5, 303, 29), (4, 389, 41)]
    ]
    exact = [[4 * shape.batch * shape.seq - 4 * shape.batch for shape in shapes]]
    coefficients = solve_sizes(exact, shapes)
    assert int(coefficients[0] @ features(Shape(batch=7, seq=50, scored=1))) == 4 * 7 * 49
    with pytest.raises(NotPolynomial):
        solve_sizes([[shape.seq**3 + shape.batch**4 for shape in shapes]], shapes)


def test_untied_layer_lists_choose_one_layer_of_each_kind() -> None:
    from autosft.profiles.memory.trace.shallow_model import shallow_model

    shallow = shallow_model(config_json(model_type="gemma3_text", num_hidden_layers=14, sliding_window=64))
    kinds = json.loads(json.dumps(shallow.layer_kinds))
    assert kinds[0] == 0
    assert kinds[-1] == shallow.config.num_hidden_layers - 1
    assert shallow.config.num_hidden_layers == 4  # first, sliding, full, last
