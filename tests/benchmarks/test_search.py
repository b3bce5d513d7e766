"""The replays of searches: every kind of table, every searcher, and what a replay counts."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
from replay.rules import regrets
from replay.searchers import SEARCHERS, Given
from replay.simulate import GoOn, Start, Trial, best_of, replay, tolerances
from replay.tables import Table, TableError, read_tables

NUM_ROWS = 24


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Our own format: a bowl over the learning rate, two seeds; the two highest rates diverge."""
    header = {
        "task": "bowl",
        "dimensions": {
            "learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
            "lr_scheduler": {"values": ["cosine", "linear"]},
        },
        "default": {"learning_rate": 1e-4, "lr_scheduler": "cosine"},
        "shares": [0.25, 0.5, 0.75, 1.0],
    }
    lines = [header]
    for row in range(NUM_ROWS):
        rate = 1e-5 * 10 ** (3 * row / (NUM_ROWS - 1))
        for seed in range(2):
            losses: list[float | None] = [
                math.exp(math.log10(rate / 6e-4) ** 2) * (1.3 - 0.3 * share) + 0.002 * seed
                for share in (0.25, 0.5, 0.75, 1.0)
            ]
            if row >= NUM_ROWS - 2:
                losses = [None] * 4
            parameters = {"learning_rate": rate, "lr_scheduler": ("cosine", "linear")[row % 2]}
            lines.append({"parameters": parameters, "seed": seed, "losses": losses})
    with gzip.open(tmp_path / "curves_bowl.jsonl.gz", "wt") as content:
        content.writelines(json.dumps(line) + "\n" for line in lines)
    [read] = read_tables(tmp_path)
    return read


def test_a_table_of_our_own_is_read(table: Table) -> None:
    assert len(table.rows) == NUM_ROWS
    assert {len(row.runs) for row in table.rows} == {2}
    assert math.isnan(table.rows[-1].runs[0].losses[0])
    default = table.rows[table.default].parameters
    assert float(default["learning_rate"]) == pytest.approx(1e-4, rel=0.2)
    assert default["lr_scheduler"] == "cosine"
    assert best_of(table, [row.runs[0] for row in table.rows])[0] == pytest.approx(1.0, abs=0.01)
    assert tolerances(table) == (0.01, 0.03)  # less noise than 1 %


def test_the_kinds_of_others_are_read(tmp_path: Path) -> None:
    curves = {"matched": [[1000, 0.8], [1500, 0.9]], "mismatched": [[1000, 0.7], [1500, 0.85]]}
    deberta = {"num_train_epochs": 2, "train_batch_size": 32, "total_model_steps": 1500, "warmup_steps": 150}
    deberta |= {"learning_rate": 1e-5, "cls_drop_out": 0.1, "learning_curves": curves}  # type: ignore[dict-item]
    with gzip.open(tmp_path / "deberta.jsonl.gz", "wt") as content:
        content.write(json.dumps(deberta) + "\n")
    losses = [1.0 - 0.01 * step for step in range(51)]
    row = {"hp": {"learning_rate": 1e-3, "beta1": 0.9}, "valid": {"loss": losses}, "test": {"loss": losses}}
    other = row | {"hp": {"learning_rate": 1e-1, "beta1": 0.99}}
    with gzip.open(tmp_path / "taskset_x.json.gz", "wt") as content:
        json.dump([row, other], content)
    rates = [
        {"model": "m-8B", "learning_rate": rate, "lora_rank": 4, "test_nll": 1.0} for rate in (1e-4, 1e-3)
    ]
    (tmp_path / "a_sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rates))
    sweep, deberta_read, taskset = sorted(
        read_tables(tmp_path), key=lambda each: each.name not in "sweep m-8B"
    )
    assert [run.shares for run in deberta_read.rows[0].runs] == [(1000 / 1500, 1.0)]
    assert deberta_read.rows[0].runs[0].judged[-1] == pytest.approx(0.15)
    assert len(taskset.rows[0].runs[0].losses) == 8
    assert taskset.rows[0].runs[0].losses[-1] == losses[-1]
    assert len(sweep.rows) == 2


@pytest.mark.parametrize("name", SEARCHERS)
@pytest.mark.parametrize("workers", [1, 4])
def test_every_searcher_stays_within_its_budget_and_starts_with_the_default(
    table: Table, name: str, workers: int
) -> None:
    budget = 5.0
    given = Given(table=table, seed=0, workers=workers, relative=table)
    trace = replay(table, SEARCHERS[name][0](given), workers=workers, seed=0, budget=budget, enough=budget)
    spent = [cost for cost, _, _ in trace.points]
    assert spent == sorted(spent)
    assert spent[-1] <= budget + workers
    regrets_so_far = [regret for _, regret, _ in trace.points]
    assert regrets_so_far == sorted(regrets_so_far, reverse=True)
    assert trace.regret_at(budget) < 1


def test_ours_finds_the_best_in_fewer_tokens_than_random(table: Table) -> None:
    def mean(name: str, num_seeds: int) -> float:
        costs = []
        for seed in range(num_seeds):
            searcher = SEARCHERS[name][0](Given(table=table, seed=seed, workers=1, relative=None))
            trace = replay(table, searcher, workers=1, seed=seed, budget=20, enough=20)
            costs.append(min(trace.reached(0.01), 20.0))
        return sum(costs) / len(costs)

    assert mean("ours", 4) < 0.6 * mean("random", 100)


def test_the_default_costs_a_full_run_and_workers_share_the_clock(table: Table) -> None:
    class Waits:
        def next(self, trials: list[Trial]) -> Start | GoOn | None:
            return None

        def keeps(self, trials: list[Trial], trial: Trial) -> bool:
            return False

    trace = replay(table, Waits(), workers=4, seed=0, budget=5, enough=5)
    assert [cost for cost, _, _ in trace.points] == [0.25, 0.5, 0.75, 1.0]
    assert trace.num_started == 1


def test_a_rule_is_compared_with_the_best_rate() -> None:
    losses = {(1e-4, 4): 1.1, (3e-4, 4): 1.0, (1e-4, 16): 1.2, (3e-4, 16): 1.0, (1e-3, 16): 1.5}
    assert regrets(losses, 3e-4) == (0.0, 0.0)
    over_all, same_rank = regrets(losses, 1e-4)
    assert (over_all, same_rank) == (pytest.approx(0.1), pytest.approx(0.15))


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1, 2]"], ids=["broken", "of another kind", "numbers"])
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(TableError, match=r"other\.json: neither"):
        read_tables(path)
