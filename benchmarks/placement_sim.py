"""Placement replayed in virtual time: thousands of trials on up to 512 GPUs.

    python benchmarks/placement_sim.py [--gpus 512] [--trials 4000] [--seed 0] [--json OUT]

Trials are drawn once and placed twice: by `scheduler.placement.place`, and first come first served with one
trial a GPU.  Printed are makespan, utilisation and, for `place`, the time of a decision, beside a lower bound
that no placement can beat.  Decisions are timed in CPU seconds, without Python's garbage collection.  Run
times are predicted with an error, so that reservations are wrong as they are in life; loads and the cost of
sharing are as in `scheduler.sharing`.

The lower bound: a trial takes at least run_s x GPUs of the cluster's time if it shares with nobody, and at
least its load x the cost of sharing of that if it does; the sum of the smaller ones over the number of GPUs,
or the longest single trial.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from autosft.profiles.hardware.device import DeviceKind, DeviceProfile
from autosft.scheduler.decide.occupancy import DeviceState, Option, Resident, device_state
from autosft.scheduler.decide.placement import (
    Placement,
    Request,
    cluster_s,
    place,
)
from autosft.scheduler.decide.sharing import TIME_SLICING_OVERHEAD, slowdown

GIB = 1 << 30
GPUS_PER_NODE = 8
#: Kinds of GPU: usable bytes, speed against the fastest, share of the nodes.
KINDS = {"80 GB": (76 * GIB, 1.0, 0.5), "24 GB": (22 * GIB, 0.5, 0.25), "8 GB": (7 * GIB, 0.25, 0.25)}
MAX_SHARING = 8
#: Predicted run times are off by up to this factor, either way.
PREDICTION_ERROR = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A mix of trials: (share of the trials, GPUs, least and most GiB, load, least and most seconds)."""

    name: str
    kinds: tuple[str, ...]
    parts: tuple[tuple[float, int, float, float, tuple[float, ...], float, float], ...]


WORKLOADS = (
    Workload(
        name="small trials alone",
        kinds=("80 GB",),
        parts=((1.0, 1, 4, 12, (0.2, 0.3, 0.4), 300, 1200),),
    ),
    Workload(
        name="small trials and gangs",
        kinds=("80 GB",),
        parts=(
            (0.6, 1, 4, 12, (0.2, 0.3, 0.4), 300, 1200),
            (0.25, 1, 30, 70, (0.9, 1.0), 600, 2400),
            (0.1, 2, 40, 70, (1.0,), 600, 2400),
            (0.04, 4, 40, 70, (1.0,), 600, 2400),
            (0.01, 8, 40, 70, (1.0,), 600, 2400),
        ),
    ),
    Workload(
        name="unlike nodes (80, 24, 8 GB)",
        kinds=("80 GB", "24 GB", "8 GB"),
        parts=(
            (0.6, 1, 2, 6, (0.3, 0.5), 300, 1200),
            (0.3, 1, 10, 20, (0.9, 1.0), 300, 1200),
            (0.1, 2, 30, 70, (1.0,), 600, 1200),
        ),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedTrial:
    """A trial and how long it really takes, by kind of GPU."""

    request: Request
    run_s: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a policy made of a workload."""

    makespan_s: float
    utilisation: float  # the lower bound's work over GPUs x makespan, 0..1
    of_bound: float  # the lower bound over the makespan, 0..1
    decision_ms: tuple[float, float, float]  # median, 99th percentile, largest


# What there is


def gpu(index: int, node: int, kind: str) -> DeviceProfile:
    usable_bytes, speed, _ = KINDS[kind]
    return DeviceProfile(
        uuid=f"GPU-{index:04d}",
        kind=DeviceKind.CUDA,
        name=kind,
        node=f"node-{node:03d}",
        index=index % GPUS_PER_NODE,
        total_bytes=usable_bytes,
        free_bytes=usable_bytes,
        compute_capability=(8, 0),
        supports_bf16=True,
        num_cores=100,
        matmul_flops_per_s=3e14 * speed,
        memory_bytes_per_s=2e12 * speed,
        rates_measured=False,
        context_bytes=0,
        is_mig=False,
        is_assumed=True,
        power_limit_w=None,
        temperature_c=None,
        throttle_reasons=(),
        processes=(),
        link_bytes_per_s=3e11,
    )


def make_cluster(kinds: Sequence[str], num_gpus: int) -> list[DeviceState]:
    """Return nodes of eight GPUs; unlike ones in the shares of `KINDS`."""
    num_nodes = max(1, num_gpus // GPUS_PER_NODE)
    total = sum(KINDS[kind][2] for kind in kinds)
    of_node: list[str] = []
    for kind in kinds:
        of_node += [kind] * round(num_nodes * KINDS[kind][2] / total)
    of_node = (of_node + [kinds[0]] * num_nodes)[:num_nodes]
    return [
        device_state(
            device=gpu(index, index // GPUS_PER_NODE, kind),
            kind=kind,
            usable_bytes=KINDS[kind][0],
            max_trials=MAX_SHARING,
            overhead=TIME_SLICING_OVERHEAD,
        )
        for index in range(num_gpus)
        for kind in [of_node[min(index // GPUS_PER_NODE, num_nodes - 1)]]
    ]


def make_trials(workload: Workload, num_trials: int, rng: random.Random) -> list[SimulatedTrial]:
    """Draw trials; one fits the kinds of GPU that have the memory, and is slower on slower ones."""
    shares = [part[0] for part in workload.parts]
    trials = []
    for number in range(num_trials):
        [(_, width, low, high, loads, least_s, most_s)] = rng.choices(workload.parts, shares)
        num_bytes = int(rng.uniform(low, high) * GIB)
        fastest_s = rng.uniform(least_s, most_s)
        load = rng.choice(loads)
        really, options = {}, []
        for kind in workload.kinds:
            usable_bytes, speed, _ = KINDS[kind]
            if num_bytes <= usable_bytes:
                really[kind] = fastest_s / speed
                error = rng.uniform(1 / PREDICTION_ERROR, PREDICTION_ERROR)
                options.append(
                    Option(
                        kind=kind,
                        num_devices=width,
                        num_bytes=num_bytes,
                        load=load,
                        run_s=fastest_s / speed * error,
                    )
                )
        trials.append(SimulatedTrial(request=Request(trial=number, options=tuple(options)), run_s=really))
    return trials


def lower_bound_s(trials: Sequence[SimulatedTrial], devices: Sequence[DeviceState]) -> float:
    """Return a makespan that no placement can beat.  Time on slower GPUs counts at their speed."""
    capacity = sum(KINDS[device.kind][1] for device in devices)
    work_s, longest_s = 0.0, 0.0
    for trial in trials:
        longest_s = max(longest_s, min(trial.run_s.values()))
        option = trial.request.options[0]
        least = 1.0 if option.num_devices > 1 else min(1.0, TIME_SLICING_OVERHEAD * option.load)
        work_s += (
            least * option.num_devices * min(run_s * KINDS[kind][1] for kind, run_s in trial.run_s.items())
        )
    return max(longest_s, work_s / capacity)


# The replay


@dataclass(slots=True)
class Job:
    """A trial that runs."""

    trial: SimulatedTrial
    option: Option
    uuids: tuple[str, ...]
    left_s: float  # with its devices to itself
    rate: float
    since: float
    resident: Resident
    version: int = 0


Decide = Callable[[dict[int, Request], dict[str, DeviceState], float], Placement | None]


class Replay:
    """A cluster in virtual time: trials on a GPU slow each other down as `scheduler.sharing` has it."""

    def __init__(self, devices: Sequence[DeviceState]) -> None:
        self.states = {device.device.uuid: device for device in devices}
        self.jobs: dict[int, Job] = {}
        self.on: dict[str, list[int]] = {uuid: [] for uuid in self.states}
        self.ends: list[tuple[float, int, int]] = []
        self.now = 0.0

    def run(self, trials: Sequence[SimulatedTrial], decide: Decide) -> list[float]:
        """Run all trials; return the seconds that each decision took."""
        waiting = {trial.request.trial: trial.request for trial in trials}
        by_number = {trial.request.trial: trial for trial in trials}
        decisions_s = []
        while waiting or self.jobs:
            while waiting:
                gc.disable()  # what it takes depends on all that this program holds
                started = time.process_time()
                found = decide(waiting, self.states, self.now)
                decisions_s.append(time.process_time() - started)
                gc.enable()
                if found is None:
                    break
                request = waiting.pop(found.trial)
                self.start(by_number[found.trial], request.options[found.option], found)
            assert self.jobs, f"nothing runs and {len(waiting)} trials wait"
            self.finish_next()
        return decisions_s

    def start(self, trial: SimulatedTrial, option: Option, found: Placement) -> None:
        resident = Resident(
            num_bytes=option.num_bytes,
            load=option.load,
            ends_at=found.ends_at,
            is_alone=option.num_devices > 1,
        )
        number = trial.request.trial
        self.jobs[number] = Job(
            trial=trial,
            option=option,
            uuids=found.device_uuids,
            left_s=trial.run_s[option.kind],
            rate=1.0,
            since=self.now,
            resident=resident,
        )
        for uuid in found.device_uuids:
            self.on[uuid].append(number)
        self.settle(found.device_uuids)

    def finish_next(self) -> None:
        """Go on to the next end of a trial; all that end with it, too."""
        while True:
            ends_at, number, version = heapq.heappop(self.ends)
            job = self.jobs.get(number)
            if job is not None and job.version == version:
                break
        self.now = ends_at
        del self.jobs[number]
        for uuid in job.uuids:
            self.on[uuid].remove(number)
        self.settle(job.uuids)

    def settle(self, uuids: Sequence[str]) -> None:
        """Bring the devices and those on them up to date after a trial has come or gone."""
        for uuid in uuids:
            state = self.states[uuid]
            here = [self.jobs[number] for number in self.on[uuid]]
            factor = slowdown(sum(item.option.load for item in here), len(here), state.overhead)
            for job in here:
                job.left_s -= (self.now - job.since) * job.rate
                job.since, job.rate = self.now, 1.0 / factor
                job.version += 1
                # Predicted from what is left, wrong by as much as before.
                error = job.option.run_s / job.trial.run_s[job.option.kind]
                job.resident = job.resident._replace(ends_at=self.now + job.left_s * factor * error)
                heapq.heappush(
                    self.ends, (self.now + job.left_s * factor, job.trial.request.trial, job.version)
                )
            self.states[uuid] = state.with_residents(tuple(item.resident for item in here))
            assert self.states[uuid].free_bytes >= 0, f"{uuid} is overbooked"


class ByPlacement:
    """`scheduler.placement.place`, told when the work there is would end."""

    def __init__(self, devices: Sequence[DeviceState], trials: Sequence[SimulatedTrial]) -> None:
        counts = Counter(device.kind for device in devices)
        self.shares_s = {trial.request.trial: cluster_s(trial.request.options, counts) for trial in trials}
        self.waiting_s = sum(self.shares_s.values())

    def __call__(
        self, waiting: dict[int, Request], states: dict[str, DeviceState], now: float
    ) -> Placement | None:
        left_s = sum(
            max((resident.ends_at - now for resident in state.residents), default=0.0)
            for state in states.values()
        )
        ends_at = now + self.waiting_s + left_s / len(states)
        found = place(waiting.values(), states.values(), now=now, work_ends_at=ends_at)
        if found is not None:
            self.waiting_s -= self.shares_s[found.trial]
        return found


def first_come_first_served(
    waiting: dict[int, Request], states: dict[str, DeviceState], now: float
) -> Placement | None:
    """Start the first trial that waits on empty GPUs of one node, or let everybody wait for it."""
    request = next(iter(waiting.values()))
    for position, option in enumerate(request.options):
        by_node: dict[str, list[str]] = {}
        for uuid, state in states.items():
            if state.kind == option.kind and not state.residents:
                by_node.setdefault(state.device.node, []).append(uuid)
        for uuids in by_node.values():
            if len(uuids) >= option.num_devices:
                return Placement(
                    trial=request.trial,
                    option=position,
                    device_uuids=tuple(uuids[: option.num_devices]),
                    ends_at=now + option.run_s,
                )
    return None


def outcome(
    devices: Sequence[DeviceState], trials: Sequence[SimulatedTrial], decide: Decide, bound_s: float
) -> Outcome:
    replay = Replay(devices)
    decisions_ms = sorted(1e3 * item for item in replay.run(trials, decide))
    capacity = sum(KINDS[device.kind][1] for device in devices)
    full = sum(
        trial.request.options[0].num_devices
        * min(run_s * KINDS[kind][1] for kind, run_s in trial.run_s.items())
        * trial.request.options[0].load
        for trial in trials
    )
    return Outcome(
        makespan_s=replay.now,
        utilisation=full / (capacity * replay.now),
        of_bound=bound_s / replay.now,
        decision_ms=(
            statistics.median(decisions_ms),
            decisions_ms[int(0.99 * (len(decisions_ms) - 1))],
            decisions_ms[-1],
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, default=512, help="how many, in nodes of 8")
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    given = parser.parse_args(arguments)
    results = []
    print(f"{given.trials} trials on {given.gpus} GPUs, seed {given.seed}; times are virtual but decisions'")
    for workload in WORKLOADS:
        devices = make_cluster(workload.kinds, given.gpus)
        trials = make_trials(workload, given.trials, random.Random(given.seed))
        bound_s = lower_bound_s(trials, devices)
        in_order = sorted(trials, key=lambda trial: trial.request.order)  # as a scheduler would keep them
        ours = outcome(devices, in_order, ByPlacement(devices, trials), bound_s)
        fcfs = outcome(devices, trials, first_come_first_served, bound_s)
        results.append(
            {"workload": workload.name, "bound_s": bound_s, "ours": asdict(ours), "fcfs": asdict(fcfs)}
        )
        print(f"\n{workload.name}: no placement ends before {bound_s / 3600:.2f} h")
        for name, one in (("place", ours), ("first come first served", fcfs)):
            print(
                f"  {name:<24} {one.makespan_s / 3600:6.2f} h  GPUs busy {one.utilisation:6.1%}  "
                f"of the bound {one.of_bound:6.1%}"
            )
        median, p99, largest = ours.decision_ms
        print(f"  a decision: {median:.2f} ms median, {p99:.2f} ms 99th percentile, {largest:.2f} ms largest")
    if given.json is not None:
        document = {"gpus": given.gpus, "trials": given.trials, "seed": given.seed, "results": results}
        given.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
