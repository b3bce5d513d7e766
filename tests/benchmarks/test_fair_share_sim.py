"""The simulated queue: what it measures is what its cluster does."""

from __future__ import annotations

import random

import pytest
from fair_share_sim import fairness, many_items, waiting
from simulated_cluster import DAY_S, HOUR_S, SMALL, Cluster, Draw, Errors, Replay, devices
from simulated_queue import MemoryQueue

from autosft.scheduler.decide.sharing import TIME_SLICING_OVERHEAD
from autosft.service.decide import shares


def test_prediction_errors_are_those_that_were_measured() -> None:
    errors = Errors()
    assert len(errors.cold) == len(errors.warm) == 12
    assert min(errors.cold) < 0.9 < 1.2 < max(errors.cold)


def test_an_item_takes_its_real_time_and_is_charged_for_it() -> None:
    cluster = Cluster(MemoryQueue(), devices(8))
    replay = Replay(cluster.queue, cluster)
    submission, work = Draw(random.Random(0), ("80 GB",)).item("ann", (SMALL,))
    replay.submit((submission, work))
    replay.step(1e9)
    assert cluster.now == pytest.approx(work.seconds)
    replay.tick()
    assert cluster.queue.num_done() == 1
    assert submission.demand is not None
    [way] = submission.demand.ways
    assert cluster.full_s == pytest.approx(work.seconds * TIME_SLICING_OVERHEAD * way.load)
    share = max(way.load, way.bytes_each / cluster.devices[0].usable_bytes)
    assert cluster.queue.used_s(now=cluster.now) == {"ann": pytest.approx(work.seconds * share)}


def test_shares_hold_in_the_small() -> None:
    for row in fairness(1, num_gpus=16, until=10 * HOUR_S):
        assert row["got"] == pytest.approx(row["wanted"], abs=0.06)


@pytest.mark.parametrize(("seed", "num_gpus"), [(0, 8), (3, 8), (18, 8), (24, 8), (13, 16)])
def test_no_item_waits_longer_than_is_promised(seed: int, num_gpus: int) -> None:
    """Seeds in whose worlds more than ten items wait for a day."""
    found = waiting(seed, num_gpus=num_gpus, until=3 * DAY_S)
    assert found["num_overdue"] > 10
    assert found["num_beyond_bound"] == 0


def test_the_bound_would_be_broken_without_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "is_overdue", lambda *_: False)
    found = waiting(24, num_gpus=8, until=3 * DAY_S)
    assert found["num_beyond_bound"] > 3


@pytest.mark.slow
def test_items_go_through_the_database() -> None:
    found = many_items(0, num_items=150)
    assert found["num_items"] == 150
