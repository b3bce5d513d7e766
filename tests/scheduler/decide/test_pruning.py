from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.scheduler.decide.pruning import Decision, PruningRule, decide, expected_cost, survivors

RULE = PruningRule(reduction_factor=2.0, min_peers=3, num_rungs=4)


@dataclass(frozen=True)
class Case:
    name: str
    value: float
    peers: list[float]
    expect: Decision
    rung: int = 1
    minimize: bool = True
    is_protected: bool = False


CASES = [
    Case("best goes on", 1.0, [2.0, 3.0, 4.0], Decision.CONTINUE),
    Case("worst stops", 5.0, [2.0, 3.0, 4.0], Decision.STOP),
    Case("worst stops, other order", 5.0, [4.0, 2.0, 3.0], Decision.STOP),
    Case("the upper half goes on", 2.5, [2.0, 3.0, 4.0], Decision.CONTINUE),
    Case("higher is better when maximizing", 5.0, [2.0, 3.0, 4.0], Decision.CONTINUE, minimize=False),
    Case("lower stops when maximizing", 1.0, [2.0, 3.0, 4.0], Decision.STOP, minimize=False),
    Case("too few peers to judge", 5.0, [2.0, 3.0], Decision.CONTINUE),
    Case("nothing is left to stop at the end", 5.0, [2.0, 3.0, 4.0], Decision.CONTINUE, rung=4),
    Case("the default always runs in full", 5.0, [2.0, 3.0, 4.0], Decision.CONTINUE, is_protected=True),
    Case("not a number stops", math.nan, [2.0, 3.0, 4.0], Decision.STOP),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decide(case: Case) -> None:
    assert (
        decide(
            rung=case.rung,
            value=case.value,
            peers=case.peers,
            rule=RULE,
            minimize=case.minimize,
            is_protected=case.is_protected,
        )
        is case.expect
    )


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=40, unique=True))
def test_of_all_that_reached_a_rung_half_continue_and_always_the_best(values: list[float]) -> None:
    going_on = [
        value
        for value in values
        if decide(
            rung=1,
            value=value,
            peers=[other for other in values if other != value],
            rule=RULE,
            minimize=True,
        )
        is Decision.CONTINUE
    ]
    assert sorted(going_on) == sorted(values)[: math.ceil(len(values) / 2)]


def test_expected_cost_is_that_of_the_expected_survivors() -> None:
    reach = survivors(RULE, 1024)
    assert sum(reach.values()) / (1024 * RULE.num_rungs) == pytest.approx(expected_cost(RULE))
