"""A simulated cluster for the service's queue, on a virtual clock: devices, drivers, what items really take.

Run times are predicted with the errors that were measured (benchmarks/data/run_times_cpu.jsonl).  Times are
in seconds, sizes in bytes; speeds are relative to the fastest kind of device.
"""

from __future__ import annotations

import gc
import heapq
import json
import random
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autosft.scheduler.decide.sharing import TIME_SLICING_OVERHEAD, slowdown
from autosft.service import loop as loop_module
from autosft.service.decide.outcomes import Ended
from autosft.service.decide.situation import Policy
from autosft.service.drivers.protocol import Life, Progress
from autosft.service.loop import Loop
from autosft.service.values import Arguments, Demand, Device, Item, Submission, Way
from autosft.studies.values import Driver

GIB = 1 << 30
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
#: Kinds of GPU: usable GiB, speed against the fastest.
KINDS = {"80 GB": (76, 1.0), "24 GB": (22, 0.5), "8 GB": (7, 0.25)}
DATA = Path(__file__).parent / "data" / "run_times_cpu.jsonl"
STOP_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an item really is."""

    seconds: float  # on the fastest kind, by its narrowest way, alone
    warm_error: float  # of the driver's own prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A share of a user's items: (weight, widths, GiB, loads, seconds)."""

    weight: float
    widths: tuple[int, ...]
    gib: tuple[float, float]
    loads: tuple[float, ...]
    seconds: tuple[float, float]


SMALL = Part(weight=0.6, widths=(1,), gib=(4, 12), loads=(0.2, 0.3, 0.4), seconds=(1200, 4800))
TINY = Part(weight=0.6, widths=(1,), gib=(2, 6), loads=(0.3, 0.5), seconds=(1200, 4800))
LARGE = Part(weight=0.25, widths=(1,), gib=(30, 70), loads=(0.9, 1.0), seconds=(2400, 9600))
MIDDLE = Part(weight=0.3, widths=(1,), gib=(10, 20), loads=(0.9, 1.0), seconds=(1200, 4800))
PAIRS = Part(weight=0.1, widths=(2,), gib=(40, 70), loads=(1.0,), seconds=(2400, 9600))
FOURS = Part(weight=0.04, widths=(4,), gib=(40, 70), loads=(1.0,), seconds=(2400, 9600))
EIGHTS = Part(weight=0.01, widths=(8,), gib=(40, 70), loads=(1.0,), seconds=(2400, 9600))
MIXED = (SMALL, LARGE, PAIRS, FOURS, EIGHTS)
UNLIKE = (TINY, MIDDLE, PAIRS)
GANGS = (PAIRS, replace(FOURS, weight=0.1))


class Errors:
    """Measured ratios of predicted to real run times, drawn again and again."""

    def __init__(self) -> None:
        rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines() if line.strip()]
        self.cold = [row["cold_s"] / row["measured_s"] for row in rows]
        self.warm = [row["predicted_s"] / row["measured_s"] for row in rows]


def devices(num_gpus: int, kinds: Sequence[str] = ("80 GB",)) -> tuple[Device, ...]:
    """Return nodes of eight GPUs; of unlike ones half are the first kind, and the rest equal shares."""
    num_nodes = max(1, num_gpus // 8)
    of_node = [kinds[0]] * num_nodes
    if len(kinds) > 1:
        rest = [kinds[1 + n % (len(kinds) - 1)] for n in range(num_nodes // 2)]
        of_node[num_nodes - len(rest) :] = sorted(rest, reverse=True)
    return tuple(
        Device(
            uuid=f"GPU-{n:04d}",
            kind=of_node[n // 8],
            name=of_node[n // 8],
            node=f"node-{n // 8:03d}",
            index=n % 8,
            total_bytes=KINDS[of_node[n // 8]][0] * GIB,
            usable_bytes=KINDS[of_node[n // 8]][0] * GIB,
            overhead=TIME_SLICING_OVERHEAD,
        )
        for n in range(num_gpus)
    )


class Draw:
    """Draws items of users."""

    def __init__(self, rng: random.Random, kinds: Sequence[str]) -> None:
        self.rng, self.kinds, self.errors = rng, kinds, Errors()

    def item(self, owner: str, parts: Sequence[Part], *, priority: int = 0) -> tuple[Submission, Work]:
        rng = self.rng
        part = rng.choices(parts, [part.weight for part in parts])[0]
        seconds, gib = rng.uniform(*part.seconds), rng.uniform(*part.gib)
        load, error = rng.choice(part.loads), rng.choice(self.errors.cold)
        ways = tuple(
            Way(
                kind=kind,
                width=width,
                bytes_each=int(gib * GIB),
                seconds=seconds / KINDS[kind][1] * error,
                seconds_low=seconds,
                seconds_high=seconds,
                load=load,
                may_share=width == 1,
            )
            for kind in self.kinds
            for width in part.widths
            if gib <= KINDS[kind][0]
        )
        submission = Submission(
            name="study",
            owner=owner,
            arguments=Arguments(command="tune"),
            demand=Demand(ways=ways),
            priority=priority,
        )
        return submission, Work(seconds=seconds, warm_error=rng.choice(self.errors.warm))


@dataclass(slots=True)
class Job:
    """A driver that runs."""

    item: int
    launch: str
    way: Way
    uuids: tuple[str, ...]
    left_s: float  # alone on its devices
    total_s: float
    since: float
    slow: float = 1.0
    version: int = 0
    is_over: bool = False
    was_stopped: bool = False


@dataclass
class Cluster:
    """Devices and drivers in virtual time."""

    queue: Any
    devices: tuple[Device, ...]
    work: dict[int, Work] = field(default_factory=dict)
    now: float = 0.0
    jobs: dict[str, Job] = field(default_factory=dict)
    done_share: dict[int, float] = field(default_factory=dict)  # kept over preemptions
    on: dict[str, list[str]] = field(default_factory=dict)
    ends: list[tuple[float, int, str, int]] = field(default_factory=list)
    full_s: float = 0.0  # work done, in seconds of a device of the fastest kind that is full

    def clock(self) -> float:
        return self.now

    # as Devices

    def read(self, own_pids: Collection[int]) -> tuple[Device, ...]:
        return self.devices

    # as Drivers

    def start(self, item: Item, devices: Sequence[Device]) -> None:
        assert item.demand is not None
        assert item.place is not None
        way = item.demand.ways[item.place.way]
        narrowest = min(one.width for one in item.demand.ways)
        total_s = self.work[item.id].seconds / KINDS[way.kind][1] * narrowest / way.width
        job = Job(
            item=item.id,
            launch=item.launch,
            way=way,
            uuids=item.place.device_uuids,
            left_s=total_s * (1.0 - self.done_share.get(item.id, 0.0)),
            total_s=total_s,
            since=self.now,
        )
        self.jobs[item.launch] = job
        process = Driver(host="sim", pid=item.id, pid_started_at=self.now)
        self.queue.claim(item.id, launch=item.launch, process=process, now=self.now)
        for uuid in job.uuids:
            self.on.setdefault(uuid, []).append(item.launch)
        self.reckon(job.uuids)

    def reckon(self, uuids: Sequence[str]) -> None:
        """Find again how fast the jobs of some devices are."""
        for launch in {launch for uuid in uuids for launch in self.on.get(uuid, ())}:
            job = self.jobs[launch]
            if job.was_stopped:
                continue
            self.advance_job(job)
            there = self.on[job.uuids[0]] if len(job.uuids) == 1 else [launch]
            load = sum(self.jobs[one].way.load for one in there)
            job.slow = slowdown(load, len(there), TIME_SLICING_OVERHEAD)
            job.version += 1
            heapq.heappush(self.ends, (self.now + job.left_s * job.slow, job.item, launch, job.version))

    def advance_job(self, job: Job) -> None:
        did_s = min(job.left_s, (self.now - job.since) / job.slow)
        job.left_s -= did_s
        job.since = self.now
        width = len(job.uuids)
        load = min(1.0, TIME_SLICING_OVERHEAD * job.way.load) if width == 1 else 1.0
        self.full_s += did_s * width * load * KINDS[job.way.kind][1]

    def poll(self, item: Item, *, now: float) -> Life | Ended:
        job = self.jobs[item.launch]
        if not job.is_over:
            return Life.ALIVE
        del self.jobs[item.launch]
        return Ended(exit_code=130 if job.was_stopped else 0, at=job.since)

    def stop(self, item: Item) -> None:
        job = self.jobs[item.launch]
        self.advance_job(job)
        self.done_share[item.id] = 1.0 - job.left_s / job.total_s
        job.was_stopped = True
        job.version += 1
        heapq.heappush(self.ends, (self.now + STOP_S, job.item, item.launch, job.version))

    def kill(self, item: Item) -> None:
        raise AssertionError("everything stops when it is asked to")

    def progress(self, item: Item, *, now: float) -> Progress | None:
        job = self.jobs[item.launch]
        left_s = job.left_s - (now - job.since) / job.slow
        share = 1.0 - max(0.0, left_s) / job.total_s
        if share < 0.05 or job.was_stopped:
            return None
        ends_at = now + max(0.0, left_s) * job.slow * self.work[item.id].warm_error
        return Progress(share=share, ends_at=ends_at)

    def pass_until(self, until: float) -> None:
        """Let time pass to the next end, or to `until`."""
        while self.ends and self.ends[0][0] <= until:
            at, _, launch, version = heapq.heappop(self.ends)
            job = self.jobs.get(launch)
            if job is None or job.version != version or job.is_over:
                continue
            self.now = at
            if not job.was_stopped:
                self.advance_job(job)
            job.since = at
            job.is_over = True
            for uuid in job.uuids:
                self.on[uuid].remove(launch)
            self.reckon(job.uuids)
            return
        self.now = until


class Replay:
    """A server on a simulated cluster."""

    def __init__(
        self,
        queue: Any,
        cluster: Cluster,
        *,
        forecast_every_s: float | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.queue, self.cluster = queue, cluster
        self.decisions_ms: list[float] = []
        self.waits: dict[int, tuple[float, float]] = {}  # submitted, started
        self.loop = Loop(
            queue,
            devices=cluster,
            drivers=cluster,
            clock=cluster.clock,
            forecast_every_s=forecast_every_s,
            policy=policy,
        )
        loop_module.FORECAST_REST = 0.0  # the pause after a forecast is in seconds of another clock
        self.loop.begin(Driver(host="sim", pid=1, pid_started_at=0.0))

    def submit(self, drawn: tuple[Submission, Work]) -> int:
        item, _ = self.queue.submit(drawn[0], now=self.cluster.now)
        self.cluster.work[item.id] = drawn[1]
        return int(item.id)

    def tick(self) -> None:
        with timed(self.decisions_ms):
            self.loop.tick()

    def step(self, until: float, *, quantum_s: float = 0.0) -> None:
        """Look once, and let time pass to the next end but not beyond `until`."""
        self.tick()
        self.cluster.pass_until(until)
        if quantum_s:  # everything that ends within it is looked at together
            stop = min(until, self.cluster.now + quantum_s)
            while self.cluster.now < stop:
                self.cluster.pass_until(stop)


@contextmanager
def timed(decisions_ms: list[float]) -> Iterator[None]:
    """Time the decisions within, in processor time of this thread and without the garbage collector."""
    decide = loop_module.decide

    def measured(situation: Any) -> Any:
        gc.disable()
        started = time.thread_time()
        found = decide(situation)
        decisions_ms.append(1e3 * (time.thread_time() - started))
        gc.enable()
        return found

    loop_module.decide = measured
    try:
        yield
    finally:
        loop_module.decide = decide


def summary_ms(decisions_ms: Sequence[float]) -> dict[str, float]:
    ordered = sorted(decisions_ms)
    return {
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[int(0.99 * (len(ordered) - 1))],
        "largest_ms": ordered[-1],
    }
