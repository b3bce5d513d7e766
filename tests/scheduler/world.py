"""A world in which things happen to a study: devices that come and go, other programs, faults to come.

All in memory and on the fake runner's virtual clock; nothing in it decides when something happens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile, usable_bytes
from autosft.profiles.recipe import ByteRange, MemoryEstimate, Sharding, StepRecipe
from autosft.scheduler.decide.planner import StepSpeed
from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.study_run import Slots, StudyRun
from autosft.studies.trial import AttemptEnd, StopReason, TrainingSettings, TrialEvent, TrialJob
from tests.plans import memory_estimate
from tests.scheduler.devices import GIB, gpu
from tests.scheduler.study_loop import NoLease, study_run
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Fault, Script

LARGE = gpu(0, free_bytes=20 * GIB)
#: Too small for a trial alone: two of them take one together.
SMALL = [
    dataclasses.replace(gpu(index, free_bytes=5 * GIB, flops=5e13), name="Small GPU", node="b")
    for index in (1, 2)
]
DEVICES = [LARGE, *SMALL]
#: A device that was not there at the start.
LATE = gpu(3, free_bytes=20 * GIB)


@functools.cache
def memory(recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile) -> MemoryEstimate:
    """4 GiB of state, split over shards, and a quarter GiB an example."""
    shards = recipe.data_parallel if recipe.sharding is Sharding.FSDP else 1
    need = 4 * GIB // shards + micro_batch * GIB // 4
    return dataclasses.replace(
        memory_estimate(), need=ByteRange(median_bytes=need, upper_bytes=need + GIB // 2), outside_bytes=GIB
    )


@functools.cache
def speed(
    recipe: StepRecipe, micro_batch: int, what: TrainingSettings, device: DeviceProfile, num_threads: int
) -> StepSpeed:
    return StepSpeed(tokens_per_s=100.0 * micro_batch, run_s=4.0, device_share=0.4)


@functools.cache
def share(device: DeviceProfile) -> Slots:
    return Slots(device=device, num_slots=2 if device.name == "Some GPU" else 1, num_threads=1)


def described(output: Path, *, num_trials: int, pauses: bool, thaws: bool = False) -> StudyRun:
    return study_run(
        output,
        num_trials=num_trials,
        rule=PruningRule(min_peers=2, pauses=pauses, thaws=thaws),
        slots=tuple(map(share, DEVICES)),
        estimate=memory,
        speed=speed,
        share=share,
    )


@dataclass
class World:
    """All that is not the loop: devices, other programs, and what has been decided to happen."""

    present: list[DeviceProfile] = field(default_factory=lambda: list(DEVICES))
    num_refusals: int = 0
    wants_to_leave: bool = False
    has_heard: bool = False  # the driver, that somebody wants it to leave
    faults: deque[tuple[Fault | None, int]] = field(default_factory=deque)  # of the next attempts

    # What the loop asks

    def devices(self) -> ClusterProfile:
        return ClusterProfile(devices=tuple(self.present), driver_version=None, cuda_version=None)

    def acquire(self, device: DeviceProfile, num_bytes: int, **_: object) -> NoLease | None:
        if self.num_refusals > 0:
            self.num_refusals -= 1
            return None
        return NoLease()

    def available_bytes(self, device: DeviceProfile) -> int:
        return usable_bytes(device)

    def holders(self, device: DeviceProfile) -> str:
        return "others"

    def are_held(self, device: DeviceProfile) -> bool:
        return True

    def most_bytes(self, device: DeviceProfile) -> int:
        return device.total_bytes

    def stop_requested(self) -> bool:
        self.has_heard = self.has_heard or self.wants_to_leave
        return self.wants_to_leave

    def script(self, job: TrialJob) -> Script:
        fault, step = self.faults.popleft() if self.faults else (None, 1)
        losses = tuple(2.0 + (job.trial * 7 % 5) / 10 - 0.1 * i for i in range(4))
        return Script(num_steps=4, eval_losses=losses, fault=fault, fault_step=step)

    def calm_down(self) -> None:
        self.present = list(DEVICES)
        self.num_refusals = 0
        self.wants_to_leave = False
        self.faults.clear()


def hangs_for(job: TrialJob, *, has_begun: bool) -> float:
    return 5.0


class ChaosRunner:
    """A fake runner in a world where things happen; holds the loop to what devices have."""

    def __init__(self, world: World, start_s: float, park: Callable[[], None]) -> None:
        self.world = world
        self.park = park  # called before events are returned
        self.fake = FakeRunner(world.script, start_s=start_s, stop_grace_s=3.0, hang_limit_s=hangs_for)
        self.jobs: list[TrialJob] = []
        self.due: list[TrialEvent] = []  # what happens before anything that was scripted
        self.told: list[TrialEvent] = []

    def run(self, job: TrialJob) -> None:
        assert job.trial not in [job.trial for job in self.jobs], "a trial runs once at a time"
        assert len(job.device_uuids) == job.plan.data_parallel
        batch = job.plan.micro_batch * job.plan.gradient_accumulation * job.plan.data_parallel
        assert batch == job.settings.effective_batch_size
        self.jobs.append(job)
        for uuid in job.device_uuids:
            [device] = [item for item in self.world.present if item.uuid == uuid]
            here = [job for job in self.jobs if uuid in job.device_uuids]
            assert sum(item.plan.booked_bytes for item in here) <= usable_bytes(device)
            assert len(here) == 1 or all(item.plan.data_parallel == 1 for item in here)
        self.fake.run(job)

    def prepare(self, job: TrialJob) -> None:
        self.fake.prepare(job)

    def events(self, timeout_s: float) -> Sequence[TrialEvent]:
        self.park()
        events = self.due or list(self.fake.events(timeout_s))
        self.due = []
        self.told += events
        over = {(event.trial, event.attempt) for event in events if isinstance(event, AttemptEnd)}
        self.jobs = [job for job in self.jobs if (job.trial, job.attempt) not in over]
        return events

    def lose(self, job: TrialJob) -> None:
        ends = [(item.trial, item.attempt) for item in self.due if isinstance(item, AttemptEnd)]
        if (job.trial, job.attempt) not in ends:
            self.due.append(self.fake.lose(job.trial, job.attempt))

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        self.fake.stop(trial, attempt, reason)

    def now(self) -> float:
        return self.fake.now()

    def close(self, *, grace_s: float) -> None:
        self.fake.close(grace_s=grace_s)
