from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.scheduler.placement import DeviceState, place
from tests.scheduler.devices import GIB, gpu


@dataclass(frozen=True)
class Case:
    name: str
    free_gib: list[float]
    need_gib: float
    expect: str | None
    slots: tuple[int, ...] = (1, 1, 1)


CASES = [
    Case("tightest fit wins", [24, 8], 6, "GPU-1"),
    Case("tightest fit wins, other order", [8, 24], 6, "GPU-0"),
    Case("lowest id among equals", [8, 8], 6, "GPU-0"),
    Case("exactly enough is enough", [6, 4], 6, "GPU-0"),
    Case("too little everywhere waits", [5, 4], 6, None),
    Case("a device without a slot is passed over", [8, 24], 6, "GPU-1", slots=(0, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_place(case: Case) -> None:
    placement = place(int(case.need_gib * GIB), states(case.free_gib, case.slots))
    assert (None if placement is None else placement.device_uuids) == (
        None if case.expect is None else (case.expect,)
    )


def states(free_gib: list[float], slots: tuple[int, ...]) -> list[DeviceState]:
    return [
        DeviceState(device=gpu(index), free_bytes=int(free * GIB), free_slots=num)
        for index, (free, num) in enumerate(zip(free_gib, slots, strict=False))
    ]


@given(
    free=st.lists(st.integers(0, 80), min_size=1, max_size=8),
    need=st.integers(1, 80),
    order=st.randoms(use_true_random=False),
)
def test_placement_fits_and_does_not_depend_on_order(free: list[int], need: int, order: object) -> None:
    given_states = states([float(one) for one in free], (1,) * len(free))
    shuffled = list(given_states)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    chosen = place(need * GIB, given_states)
    assert chosen == place(need * GIB, shuffled)
    if chosen is None:
        assert max(free) < need
    else:
        [uuid] = chosen.device_uuids
        assert free[int(uuid.removeprefix("GPU-"))] >= need
