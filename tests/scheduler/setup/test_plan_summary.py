"""What the plan of a study says of its data."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from autosft.scheduler.decide.search_space import default_batches
from autosft.scheduler.setup import plan_summary
from autosft.studies.search.dimensions import Fixed
from tests.scheduler.setup.test_design import DATA


def said(num_train: int, max_samples: int | None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(plan_summary, "describe", lambda data, lengths: ["messages"])
    counts = dataclasses.replace(DATA.train, num_examples=num_train)
    data = dataclasses.replace(DATA, train=counts)
    space: Any = {"seq_len": Fixed(value=64)}
    settings: Any = SimpleNamespace(seq_len=64)
    return "\n".join(plan_summary.data_lines(data, space, settings, max_samples))


def test_fewer_examples_than_there_are_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "trained on: 300 of the 550, drawn by the seed" in said(550, 300, monkeypatch)
    for limit in (None, 550, 600):
        assert "trained on" not in said(550, limit, monkeypatch)


def test_few_records_are_said_with_what_shows_how_much_hangs_on_the_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = said(10, None, monkeypatch)
    assert "few records: 10 to compare trials on" in few
    assert "--fold 1/5 to 5/5" in few
    assert "few records" not in said(180, None, monkeypatch)  # 200 with the held-out ones


@pytest.mark.parametrize(
    ("num_examples", "sizes"), [(1000, [8, 16, 32, 64]), (90, [8]), (75, [4]), (30, [2]), (3, [1])]
)
def test_default_batches_are_powers_of_two(num_examples: int, sizes: list[int]) -> None:
    assert default_batches(num_examples) == sizes
