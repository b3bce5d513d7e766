"""The cap of a trial that measures itself: what is free, with a reserve where RAM is what it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.recipe import ByteRange
from autosft.scheduler.decide.self_measuring import (
    capped_at,
    capped_at_peak,
    describe_memory,
    measuring_cap_bytes,
)
from autosft.workers.processes.memory_limit import with_room
from tests.plans import execution_plan, memory_estimate
from tests.scheduler.devices import GIB, gpu
from tests.studies.study_examples import evaluation

CPU = replace(gpu(), kind=DeviceKind.CPU, name="A CPU")
GUESS = memory_estimate(
    need=ByteRange(median_bytes=3 * GIB, upper_bytes=5 * GIB), outside_bytes=0, untraced=("the step",)
)
PLAN = execution_plan(estimate=GUESS, memory_cap_bytes=20 * GIB, measures_itself=True)


def test_a_gpu_is_taken_whole_and_a_host_keeps_room() -> None:
    assert measuring_cap_bytes(gpu(), 20 * GIB) == 20 * GIB
    cap_bytes = measuring_cap_bytes(CPU, 20 * GIB)
    assert cap_bytes > 17 * GIB
    assert with_room(cap_bytes) <= 20 * GIB
    assert measuring_cap_bytes(CPU, 100 << 20) == 0, "nothing can run in what is less than the room"


@pytest.mark.parametrize(
    ("free_gib", "expect_gib"),
    [(30, 20), (20, 20), (8, 8), (3, 3), (2, None)],
    ids=["more is free", "as planned", "less", "as much as is guessed", "less than is guessed"],
)
def test_the_cap_follows_what_is_free_at_the_start(free_gib: int, expect_gib: int | None) -> None:
    capped = capped_at(PLAN, gpu(), free_gib * GIB)
    assert (capped and capped.booked_bytes) == (expect_gib and expect_gib * GIB)
    if capped is not None:
        assert f"capped at {expect_gib}.0 GiB" in capped.reason


def test_what_only_evaluates_is_capped_at_the_peak_of_its_training() -> None:
    seen = replace(evaluation(0, 1, 1), peak_allocated_bytes=4 * GIB, peak_reserved_bytes=None)
    capped = capped_at_peak(PLAN, [seen, replace(seen, peak_allocated_bytes=GIB)])
    assert 4.4 * GIB < capped.memory_cap_bytes < 4.5 * GIB
    assert capped_at_peak(PLAN, []) == PLAN
    predicted = replace(PLAN, measures_itself=False)
    assert capped_at_peak(predicted, [seen]) == predicted


def test_a_plan_says_whether_its_memory_is_measured_or_predicted() -> None:
    said = describe_memory(PLAN)
    assert "measured, not predicted: the first trial measures itself, alone on its device" in said
    assert "capped at 20.0 GiB" in said
    assert "could not follow the step" in said
    assert "a guess, not a bound" in said
    known = memory_estimate(method="measured", num_calibration_rows=1)
    assert "1 earlier trial took it" in describe_memory(execution_plan(estimate=known))
    traced = memory_estimate(method="trace and replay")
    assert describe_memory(execution_plan(estimate=traced)).endswith("predicted by trace and replay")
