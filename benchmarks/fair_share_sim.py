"""The service's queue replayed in virtual time: fairness, waiting, utilisation, forecasts, 10,000 items.

    python benchmarks/fair_share_sim.py [--only fairness waiting forecasts utilisation items] [--json OUT]

The product's own loop and decisions run; drivers and clock are simulated.  Run times are predicted with the
errors that were measured (benchmarks/data/run_times_cpu.jsonl): before the start, and, once a twentieth is
done, by the driver itself.  Items that share a device slow each other down as `scheduler.decide.sharing` has
it.  Decisions are timed in CPU seconds, without Python's garbage collection.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulated_cluster import (
    DAY_S,
    GANGS,
    HOUR_S,
    KINDS,
    LARGE,
    MIXED,
    SMALL,
    UNLIKE,
    Cluster,
    Draw,
    Replay,
    devices,
    summary_ms,
)
from simulated_queue import MemoryQueue
from waiting_bound import Watched

from autosft.service.store.queue_store import QueueStore, open_queue


def fairness(seed: int, *, num_gpus: int = 32, until: float = DAY_S) -> list[dict[str, Any]]:
    """Two users whose queues are never empty, for a day: one with many small items, one with gangs."""
    results = []
    for shares in ((1.0, 1.0), (2.0, 1.0)):
        cluster = Cluster(MemoryQueue(shares={"small": shares[0], "gangs": shares[1]}), devices(num_gpus))
        replay = Replay(cluster.queue, cluster)
        draw = Draw(random.Random(seed), ("80 GB",))
        while cluster.now < until:
            for owner, parts in (("small", (SMALL, LARGE)), ("gangs", GANGS)):
                while cluster.queue.num_queued(owner) < 40:
                    replay.submit(draw.item(owner, parts))
            replay.step(until, quantum_s=20.0)
        used = cluster.queue.used_s(now=cluster.now)
        wanted = shares[0] / sum(shares)
        got = used["small"] / sum(used.values())
        results.append(
            {
                "shares": f"{shares[0]:g}:{shares[1]:g}",
                "gpu_hours": {owner: round(value / HOUR_S, 1) for owner, value in used.items()},
                "wanted": wanted,
                "got": got,
                "off": abs(used["small"] / shares[0] / (used["gangs"] / shares[1]) - 1.0),
                "num_done": cluster.queue.num_done(),
                **summary_ms(replay.decisions_ms),
            }
        )
    return results


def arrivals(
    replay: Replay,
    draw: Draw,
    *,
    load: float,
    until: float,
    urgent: float,
    on_submit: Callable[[int], object] = bool,
) -> None:
    """Submit items of three users at random times, so many that devices are busy for a share of the time."""
    rng, cluster = draw.rng, replay.cluster
    probe = [draw.item("x", MIXED) for _ in range(2000)]
    mean_s = statistics.fmean(
        work.seconds * one.demand.ways[0].width * (min(1.0, 1.1 * one.demand.ways[0].load))
        for one, work in probe
        if one.demand
    )
    gap_s = mean_s / (load * len(cluster.devices))
    next_at = 0.0
    while cluster.now < until:
        while next_at <= cluster.now:
            owner = rng.choice(["ann", "bob", "eve"])
            item = replay.submit(draw.item(owner, MIXED, priority=int(rng.random() < urgent)))
            next_at += rng.expovariate(1.0 / gap_s)
            replay.tick()
            on_submit(item)
        replay.step(min(until, next_at))


def waiting(seed: int, *, num_gpus: int = 32, until: float = 4 * DAY_S) -> dict[str, Any]:
    """Four days at 95 % of what the devices can do, a third of the items of a higher priority."""
    cluster = Cluster(MemoryQueue(), devices(num_gpus))
    replay = Watched(cluster.queue, cluster)
    draw = Draw(random.Random(seed), ("80 GB",))
    arrivals(replay, draw, load=0.95, until=until, urgent=0.33)
    waits, promises = cluster.queue.waits(now=cluster.now), replay.promises
    return {
        "num_items": len(cluster.work),
        "median_h": statistics.median(waits) / HOUR_S,
        "longest_h": max(waits) / HOUR_S,
        "num_overdue": len(promises.until),
        "largest_share_of_bound": max(promises.shares, default=0.0),
        "num_beyond_bound": promises.num_broken(cluster.now),
        "num_preempted": cluster.queue.num_preempted,
        **summary_ms(replay.decisions_ms),
    }


def forecasts(seed: int) -> dict[str, Any]:
    """Predicted against real starts: what an item is told when it is submitted, over two busy days."""
    cluster = Cluster(MemoryQueue(), devices(32))
    replay = Replay(cluster.queue, cluster, forecast_every_s=1e9)
    draw = Draw(random.Random(seed), ("80 GB",))
    told: dict[int, tuple[float, float | None]] = {}

    def remember(item: int) -> None:
        view = replay.loop.view
        planned = None if view is None else view.forecast.planned.get(item)
        told[item] = cluster.now, None if planned is None else planned.starts_at

    arrivals(replay, draw, load=1.05, until=2 * DAY_S, urgent=0.0, on_submit=remember)
    errors, num_told = [], 0
    for item, (submitted_at, predicted) in told.items():
        started_at = cluster.queue.first_start(item)
        if started_at is None or started_at - submitted_at < 600.0:
            continue
        num_told += predicted is not None
        if predicted is not None:
            errors.append(abs(predicted - started_at) / (started_at - submitted_at))
    ordered = sorted(errors)
    return {
        "num_items": len(told),
        "num_waited": len(errors),
        "median_error": statistics.median(ordered),
        "p90_error": ordered[int(0.9 * (len(ordered) - 1))],
        **summary_ms(replay.decisions_ms),
    }


def utilisation(seed: int, *, num_gpus: int = 512, until: float = 3 * HOUR_S) -> list[dict[str, Any]]:
    """A standing queue of 1,000 items on 512 GPUs for three hours."""
    results = []
    for name, kinds, parts in (
        ("mixed", ("80 GB",), MIXED),
        ("unlike nodes", ("80 GB", "24 GB", "8 GB"), UNLIKE),
    ):
        cluster = Cluster(MemoryQueue(), devices(num_gpus, kinds))
        replay = Replay(cluster.queue, cluster)
        draw = Draw(random.Random(seed), kinds)
        while cluster.now < until:
            while cluster.queue.num_queued() < 1000:
                replay.submit(draw.item(draw.rng.choice(["ann", "bob", "eve"]), parts))
            replay.step(until, quantum_s=30.0)
        for job in cluster.jobs.values():
            if not job.is_over:
                cluster.advance_job(job)
        capacity_s = sum(KINDS[device.kind][1] for device in cluster.devices) * until
        results.append(
            {
                "workload": name,
                "of_bound": cluster.full_s / capacity_s,
                "num_done": cluster.queue.num_done(),
                **summary_ms(replay.decisions_ms),
            }
        )
    return results


def many_items(seed: int, num_items: int = 10_000) -> dict[str, Any]:
    """So many items through the queue in its database (SQLite), a hundred waiting at a time."""
    with tempfile.TemporaryDirectory() as folder:
        queue: QueueStore = open_queue(f"sqlite:///{folder}/studies.db")
        cluster = Cluster(queue, devices(64))
        replay = Replay(queue, cluster)
        draw = Draw(random.Random(seed), ("80 GB",))
        brief = replace(SMALL, seconds=(300, 900))
        memory_mib, num_submitted, num_ended = {}, 0, 0
        while num_ended < num_items:
            open_items = len(replay.loop._items)
            for _ in range(min(100, num_items - num_submitted) if open_items < 300 else 0):
                replay.submit(draw.item(draw.rng.choice(["ann", "bob"]), (brief,)))
                num_submitted += 1
            replay.step(cluster.now + 60.0, quantum_s=60.0)
            num_ended = num_submitted - len(replay.loop._items)
            if num_ended // 1000 > len(memory_mib):
                memory_mib[num_ended // 1000 * 1000] = round(rss_mib(), 1)
                cluster.work = {item.id: cluster.work[item.id] for item in replay.loop._items}
        queue.close()
    return {"num_items": num_items, "memory_mib": memory_mib, **summary_ms(replay.decisions_ms)}


def rss_mib() -> float:
    import psutil

    gc.collect()
    return float(psutil.Process().memory_info().rss) / (1 << 20)


SCENARIOS: dict[str, Callable[[int], Any]] = {
    "fairness": fairness,
    "waiting": waiting,
    "forecasts": forecasts,
    "utilisation": utilisation,
    "items": many_items,
}


def show(name: str, result: Any) -> None:
    for row in result if isinstance(result, list) else [result]:
        print(f"{name}: " + ", ".join(f"{key} {_said(value)}" for key, value in row.items()))


def _said(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    given = parser.parse_args(arguments)
    document: dict[str, Any] = {"seed": given.seed}
    for name in given.only:
        started = time.process_time()
        document[name] = SCENARIOS[name](given.seed)
        show(name, document[name])
        print(f"  ({time.process_time() - started:.0f} s of CPU time)", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
