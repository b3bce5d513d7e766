"""What a measured trial says of others: exact for the same step, on the safe side for all else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from autosft.profiles.recipe import ByteRange, Checkpointing, MemoryEstimate, Sharding, StepRecipe
from autosft.scheduler.decide.measured_memory import (
    NOTHING_MEASURED,
    MeasuredMemory,
    MeasuredRun,
    measured_memory,
    rests_on_trials,
)
from autosft.scheduler.decide.planner import recipe_for
from tests.plans import memory_estimate
from tests.scheduler.decide.test_planner import PINNED
from tests.workers.small import settings

GIB = 1 << 30
MIB = 1 << 20
RECIPE = replace(
    recipe_for(settings(effective_batch_size=16, seq_len=1024), PINNED, Checkpointing.OFF, 2),
    eval_micro_batch=4,
)
#: Weights and optimizer state of the model that the tests measure, and what a row of 1,024 tokens takes.
FLOOR, ROW = 4 * GIB, GIB


def unknown(**changes: object) -> MemoryEstimate:
    made = memory_estimate(untraced=("the step",), floor_bytes=FLOOR, longest=1024, outside_bytes=0)
    return replace(made, **changes)  # type: ignore[arg-type]


def run(
    micro_batch: int = 4,
    *,
    peak_gib: float | None = 8.0,
    longest: int = 1024,
    recipe: StepRecipe = RECIPE,
    cap_gib: float = 40.0,
    **changes: object,
) -> MeasuredRun:
    made = MeasuredRun(
        recipe=recipe,
        micro_batch=micro_batch,
        longest=longest,
        device_name="a GPU",
        cap_bytes=int(cap_gib * GIB),
        peak_bytes=None if peak_gib is None else int(peak_gib * GIB),
        reserved_bytes=None,
        out_of_memory=peak_gib is None,
        predicted=unknown(),
        measured_itself=True,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def asked(
    memory: MeasuredMemory,
    micro_batch: int,
    *,
    recipe: StepRecipe = RECIPE,
    longest: int = 1024,
    device: str = "a GPU",
) -> float | None:
    """Return the most that a step is said to need in GiB, None where nothing is said."""
    found = memory.estimate(unknown(longest=longest), recipe, micro_batch, 9999, device)
    return None if found.untraced else found.need.upper_bytes / GIB


@dataclass(frozen=True)
class Case:
    name: str
    expect: float | None  # GiB before the margin
    micro_batch: int = 4
    recipe: StepRecipe = RECIPE
    longest: int = 1024
    device: str = "a GPU"


LORA = settings(effective_batch_size=16, seq_len=1024)
CASES = [
    Case("the same step", 8.0),
    Case("fewer rows are bounded by more", 8.0, micro_batch=2),
    Case("twice the rows: twice what lies above the floor", 12.0, micro_batch=8),
    Case("shorter examples", 8.0, longest=100),
    Case("twice the length may take four times as much", 20.0, longest=2048),
    Case("an evaluation batch twice as large", 12.0, recipe=replace(RECIPE, eval_micro_batch=8)),
    Case("another device", None, device="another GPU"),
    Case("another precision", None, recipe=replace(RECIPE, precision=PINNED.precision.FP32)),
    Case(
        "checkpointing is another step",
        None,
        recipe=replace(RECIPE, checkpointing=Checkpointing.NON_REENTRANT),
    ),
    Case("another optimizer", None, recipe=replace(RECIPE, optimizer="sgd")),
    Case("sharded", None, recipe=replace(RECIPE, sharding=Sharding.FSDP, data_parallel=2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_one_run_says_of_another_step(case: Case) -> None:
    memory = measured_memory([run(4, peak_gib=8.0)])
    found = asked(memory, case.micro_batch, recipe=case.recipe, longest=case.longest, device=case.device)
    if case.expect is None:
        assert found is None
    else:
        assert found == pytest.approx(1.1 * case.expect + 32 / 1024, abs=0.01)


def test_a_larger_peak_of_the_same_step_replaces_the_smaller() -> None:
    memory = measured_memory([run(peak_gib=8.0), run(peak_gib=8.5), run(peak_gib=8.2)])
    assert len(memory.runs) == 1
    assert asked(memory, 4) == pytest.approx(1.1 * 8.5 + 32 / 1024, abs=0.01)


def test_the_closer_run_decides() -> None:
    memory = measured_memory([run(2, peak_gib=6.0), run(8, peak_gib=12.0)])
    assert asked(memory, 4) == pytest.approx(1.1 * 8.0 + 32 / 1024, abs=0.01), (
        "8 by the line, 12 by the larger"
    )


def test_a_run_never_needs_more_than_the_cap_that_it_ran_under() -> None:
    memory = measured_memory([run(4, peak_gib=8.0, cap_gib=8.25)])
    assert asked(memory, 4) == pytest.approx(8.25)


def test_what_accumulates_keeps_its_gradients_beside() -> None:
    whole = replace(RECIPE, gradient_accumulation=1)
    memory = measured_memory([run(16, peak_gib=20.0, recipe=whole)])
    guess = unknown(components=(("gradients", 2 * GIB), ("activations", GIB)))
    found = memory.estimate(guess, RECIPE, 8, 1024, "a GPU")
    assert found.need.median_bytes == 22 * GIB


@pytest.mark.parametrize(
    ("name", "micro_batch", "recipe", "expect"),
    [
        ("the same rows", 8, RECIPE, True),
        ("more rows", 16, RECIPE, True),
        ("fewer rows", 4, RECIPE, False),
        ("the same with checkpointing", 8, replace(RECIPE, checkpointing=Checkpointing.NON_REENTRANT), False),
        ("a replica on two devices", 8, replace(RECIPE, sharding=Sharding.DDP, data_parallel=2), True),
        ("shards on two devices", 8, replace(RECIPE, sharding=Sharding.FSDP, data_parallel=2), False),
        ("a smaller evaluation batch", 8, replace(RECIPE, eval_micro_batch=2), False),
    ],
)
def test_what_ran_out_of_memory(name: str, micro_batch: int, recipe: StepRecipe, expect: bool) -> None:
    memory = measured_memory([run(8, peak_gib=None)])
    assert memory.ran_out(recipe, micro_batch, 1024, "a GPU") is expect
    assert not memory.ran_out(recipe, micro_batch, 1024, "another GPU")


def test_a_line_that_lies_below_what_ran_out_is_not_used() -> None:
    """Eight rows are 12 GiB by the line from four, but ran out under 14."""
    runs = [run(4, peak_gib=8.0), run(8, peak_gib=None, cap_gib=14.0)]
    assert asked(measured_memory(runs), 8) is None
    assert asked(measured_memory(runs), 4) is not None
    assert asked(measured_memory([runs[0], replace(runs[1], cap_bytes=10 * GIB)]), 8) is not None


def traced(need_gib: float, **changes: object) -> MemoryEstimate:
    need = int(need_gib * GIB)
    bound = ByteRange(median_bytes=need, upper_bytes=need + GIB // 4)
    made = memory_estimate(
        need=bound,
        allocated=bound,
        outside_bytes=0,
        method="trace and replay",
        uncalibrated_bytes=need,
        longest=1024,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_prediction_that_held_stays() -> None:
    held = run(4, peak_gib=5.0, predicted=traced(5.0), measured_itself=False)
    assert measured_memory([held]) is NOTHING_MEASURED


@pytest.mark.parametrize("rows", [2, 4, 8], ids=str)
def test_what_a_run_took_above_its_prediction_is_added_to_all_of_its_kind(rows: int) -> None:
    """Four rows were predicted to take 5 GiB and took 7; another optimizer and checkpointing are alike."""
    memory = measured_memory([run(4, peak_gib=7.0, predicted=traced(5.0), measured_itself=False)])
    spared = replace(RECIPE, checkpointing=Checkpointing.NON_REENTRANT, optimizer="sgd")
    found = memory.estimate(traced(3.0), spared, rows, 1024, "a GPU")
    assert rests_on_trials(found)
    assert found.need.median_bytes == (3 + 2 * max(1, rows // 4)) * GIB
    assert found.uncalibrated_bytes == 3 * GIB, "what is learned from is the prediction itself"


def test_a_prediction_that_ran_out_is_worthless_until_a_trial_has_run() -> None:
    ran_out = run(8, peak_gib=None, predicted=traced(9.0), cap_gib=9.25, measured_itself=False)
    memory = measured_memory([ran_out])
    assert memory.estimate(traced(5.0), RECIPE, 4, 1024, "a GPU").untraced
    measured = memory.with_run(run(4, peak_gib=7.0, predicted=traced(5.0, untraced=("what it takes",))))
    found = measured.estimate(traced(5.0), RECIPE, 4, 1024, "a GPU")
    assert not found.untraced
    assert found.need.median_bytes == 7 * GIB
    assert measured.estimate(
        traced(5.0), replace(RECIPE, loss=None, attention="eager"), 4, 1024, "a GPU"
    ) == (traced(5.0)), "another kind of step is predicted as before"


ROWS = st.integers(1, 64)
LENGTHS = st.integers(16, 4096)


@hypothesis_settings(deadline=None)
@given(ROWS, LENGTHS, ROWS, LENGTHS, st.floats(0, 4), st.floats(0, 0.002), st.floats(0, 1e-6))
def test_a_bound_is_never_below_the_truth(
    rows: int, length: int, other_rows: int, other_length: int, constant: float, linear: float, square: float
) -> None:
    """Whatever share of a row is constant, linear or quadratic in its length, in GiB."""

    def truth(batch: int, seq: int) -> float:
        return FLOOR / GIB + constant + batch * (linear * seq + square * seq * seq)

    memory = measured_memory([run(rows, peak_gib=truth(rows, length), longest=length, cap_gib=1e6)])
    recipe = replace(RECIPE, eval_micro_batch=1)
    memory = measured_memory([replace(item, recipe=recipe) for item in memory.runs])
    found = asked(memory, other_rows, longest=other_length, recipe=recipe)
    assert found is not None
    assert found >= truth(other_rows, other_length)
    smallest = min(truth(rows, length), truth(other_rows, other_length))
    assert memory.known_need_bytes(recipe, other_rows, other_length, "a GPU") <= smallest * GIB + 1
