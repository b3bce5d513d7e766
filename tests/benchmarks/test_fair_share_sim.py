"""The simulated queue: what it measures is what its cluster does."""

from __future__ import annotations

import random

import pytest
from fair_share_sim import fairness, many_items
from simulated_cluster import HOUR_S, SMALL, Cluster, Draw, Errors, Replay, devices
from simulated_queue import MemoryQueue

from autosft.scheduler.decide.sharing import TIME_SLICING_OVERHEAD


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


@pytest.mark.slow
def test_items_go_through_the_database() -> None:
    found = many_items(0, num_items=150)
    assert found["num_items"] == 150
