"""The longest that an item may wait by docs/service.md, reckoned for each item of a simulated queue.

An item that has waited for `Policy.max_wait_s` goes before all that were submitted later.  From then on it
waits at most for what is left of the items that were submitted before, spread over all devices, and for the
longest item: devices that are kept for it, and for each older gang before it, are free when that ends.  What
overtakes it is predicted to be over by then, and may take as much longer as predictions are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from simulated_cluster import Cluster, Errors, Job, Replay

from autosft.service.decide.situation import Policy
from autosft.service.values import Item


@dataclass(slots=True)
class Promises:
    """What is promised to each item that has waited too long, and what became of it."""

    max_wait_s: float = Policy().max_wait_s
    until: dict[tuple[int, float], float] = field(default_factory=dict)  # by item, and since when it waits
    since: dict[tuple[int, float], float] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)  # of what was promised, that kept items have waited

    def look(self, cluster: Cluster) -> None:
        """Promise what is due to items that have waited too long by now, and see which have started."""
        queued = {(item.id, item.queued_at): item for item in cluster.queue.open.values() if item.is_queued}
        for key, item in queued.items():
            overdue_at = item.queued_at + self.max_wait_s
            if key not in self.until and cluster.now >= overdue_at:
                self.since[key] = overdue_at
                self.until[key] = cluster.now + bound_s(item, cluster)
        for key in [key for key in self.until if key not in queued and key in self.since]:
            waited_s = cluster.now - self.since.pop(key)
            self.shares.append(waited_s / (self.until[key] - (key[1] + self.max_wait_s)))

    def num_broken(self, now: float) -> int:
        """Return how many have waited for longer than promised, those that still wait included."""
        late = sum(now > self.until[key] for key in self.since)
        return late + sum(share > 1.0 for share in self.shares)


def bound_s(item: Item, cluster: Cluster) -> float:
    """Return how long an item that has waited too long waits on at most."""
    running = {job.item: job for job in cluster.jobs.values() if not job.is_over}
    older = [other for other in cluster.queue.open.values() if other.id < item.id]
    device_s, num_gangs = 0.0, 0
    longest_s = longest_left_s(cluster)
    for other in older:
        assert other.demand is not None
        job = running.get(other.id)
        if job is not None:
            device_s += len(job.uuids) * left_s(job, cluster) * job.slow
            continue
        left = cluster.work[other.id].seconds * (1.0 - cluster.done_share.get(other.id, 0.0))
        device_s += other.demand.narrowest.width * left
        num_gangs += other.demand.narrowest.width > 1
        longest_s = max(longest_s, left)
    return device_s / len(cluster.devices) + (1 + num_gangs) * longest_s / min(Errors().cold)


def longest_left_s(cluster: Cluster) -> float:
    """Return the longest that an item goes on that runs now."""
    return max(
        (left_s(job, cluster) * job.slow for job in cluster.jobs.values() if not job.is_over), default=0.0
    )


def left_s(job: Job, cluster: Cluster) -> float:
    return max(0.0, job.left_s - (cluster.now - job.since) / job.slow)


class Watched(Replay):
    """A replay that looks after every decision whether what is promised is kept."""

    def __init__(self, queue: Any, cluster: Cluster) -> None:
        super().__init__(queue, cluster)
        self.promises = Promises()

    def tick(self) -> None:
        super().tick()
        self.promises.look(self.cluster)
