"""Ways to hold what is trained: what they take, and what was measured of their loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.memory_ways import LEAN_WAYS, WAYS, loss_in_words, measured_loss, require_way, ways_of
from autosft.profiles.optimizers import OPTIMIZERS

ROOT = Path(__file__).parents[2]


def test_bytes_of_a_weight() -> None:
    assert {way.name: round(way.bytes_per_weight or 0, 2) for way in LEAN_WAYS} == {
        "lean": 6.03,
        "leanest": 5.03,
    }
    assert WAYS["exact"].bytes_per_weight is None


def test_every_lean_way_rounds_as_its_optimizer_can_and_has_a_measured_loss() -> None:
    for way in LEAN_WAYS:
        assert way.precision is not None
        assert way.precision.rounds_stochastically
        assert OPTIMIZERS[way.optimizer or ""].rounds_stochastically
        found = measured_loss(way)
        assert found is not None
        assert found.num_runs >= 27, "three tasks, seeds and rates"
        assert f"{found.excess:+.1%}" in loss_in_words(way)
    assert measured_loss(WAYS["exact"]) is None


def test_what_the_plan_quotes_is_the_sum_of_the_committed_runs() -> None:
    pytest.importorskip("torch")
    from benchmarks.lean_losses import OFFERED, RATES, SEEDS, TASKS, Row, summary

    lines = (ROOT / "benchmarks/data/lean_losses.jsonl").read_text().splitlines()
    rows = [Row(**json.loads(line)) for line in lines]
    assert {(row.task, row.seed, row.rate) for row in rows if row.way == "lean"} == {
        (task, seed, rate) for task in TASKS for seed in SEEDS for rate in RATES
    }
    stored = json.loads((ROOT / "profiles/data/memory_ways.json").read_text())
    assert stored == {name: summary(rows)[name] for name in OFFERED}


REFUSED = [
    ("lean", "lora", "auto", False, "adapters are small"),
    ("lean", "qlora", "auto", False, "adapters are small"),
    ("auto", "full", "fp32", False, "--precision fp32"),
    ("leanest", "full", "auto", True, "--optimizer"),
]


@pytest.mark.parametrize(("memory", "method", "precision", "has_optimizer", "words"), REFUSED)
def test_what_contradicts_a_way_is_refused(
    memory: str, method: str, precision: str, has_optimizer: bool, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        require_way(memory, method, precision, has_optimizer=has_optimizer)
    require_way("exact", method, precision, has_optimizer=has_optimizer)


def test_the_order_in_which_ways_are_tried() -> None:
    assert [way.name for way in ways_of("auto")] == ["exact", "lean", "leanest"]
    assert [way.name for way in ways_of("lean")] == ["lean"]
