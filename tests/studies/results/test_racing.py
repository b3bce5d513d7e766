"""Racing over prompts: what is given up, how seldom wrongly, and scores that stay comparable."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autosft.studies.results.racing import (
    BLOCK,
    describe_difference,
    estimated_score,
    is_hopeless,
)

CASES = [
    ("nothing answered yet", [], [True] * 64, False),
    ("the same answers tell nothing", [True] * 64, [True] * 64, False),
    ("worse by luck", [False] * 3 + [True] * 61, [True] * 64, False),
    ("clearly worse", [False] * 8, [True] * 64, True),
    ("clearly better", [True] * 64, [False] * 64, False),
    ("losses made up for by wins", [False] * 8 + [True] * 6, [True] * 8 + [False] * 6, False),
]


@pytest.mark.parametrize(
    ("name", "candidate", "incumbent", "expected"), CASES, ids=[case[0] for case in CASES]
)
def test_which_candidate_is_abandoned(
    name: str, candidate: list[bool], incumbent: list[bool], expected: bool
) -> None:
    assert is_hopeless(candidate, incumbent) is expected


def race(rng: random.Random, rate: float, incumbent_rate: float, shared: float) -> int:
    """Return after how many of 541 prompts a candidate is given up, 541 for never.

    `shared` of the prompts are so easy or hard that both candidates do the same.
    """
    ours, theirs = [], []
    for _ in range(541):
        if rng.random() < shared:
            ours.append(same := rng.random() < incumbent_rate)
            theirs.append(same)
        else:
            ours.append(rng.random() < rate)
            theirs.append(rng.random() < incumbent_rate)
    looks = range(BLOCK, 541, BLOCK)
    return next((num for num in looks if is_hopeless(ours[:num], theirs)), 541)


def test_equals_are_seldom_abandoned_and_hopeless_ones_soon() -> None:
    rng = random.Random(0)
    equal = [race(rng, 0.25, 0.25, 0.5) for _ in range(400)]
    assert sum(num < 541 for num in equal) / 400 < 0.04
    hopeless = sorted(race(rng, 0.02, 0.30, 0.0) for _ in range(100))
    assert hopeless[50] <= 64  # of 541: an eighth of the prompts


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.lists(st.booleans(), min_size=1, max_size=60))
def test_an_estimate_is_a_share_and_a_full_answer_is_itself(candidate: list[bool], other: list[bool]) -> None:
    assert 0.0 <= estimated_score(candidate, other) <= 1.0
    assert estimated_score(candidate, None) == sum(candidate) / len(candidate)
    assert estimated_score(other, other) == pytest.approx(sum(other) / len(other))


def test_the_first_prompts_being_easy_does_not_help_a_candidate_that_was_abandoned() -> None:
    incumbent = [True] * 32 + [False] * 68
    assert estimated_score([True] * 20 + [False] * 12, incumbent) == 0.0  # 0.32 - 12/32, not 20/32
    assert estimated_score([True] * 32, incumbent) == pytest.approx(0.32)


def test_a_difference_is_a_tie_unless_the_prompts_say_otherwise() -> None:
    assert describe_difference([True] * 20, [False] * 20).startswith("20 prompts gained and 0 lost of 20")
    assert describe_difference([True, False], [False, True]).startswith("a tie, 1 prompt gained and 1 lost")
    assert describe_difference([True] * 9, [True] * 9) == (
        "a tie, 0 prompts gained and 0 lost of 9 (sign test, p = 1)"
    )
