"""A study ends with exactly the trials that were asked for, whatever happens in between.

Generated interleavings of faults, users' commands, devices that join and leave, other programs in the way,
and drivers that die, on the fake runner's virtual clock over real records in SQLite.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autosft.profiles.hardware import ClusterProfile, DeviceProfile
from autosft.profiles.recipe import ByteRange, MemoryEstimate, Sharding, StepRecipe
from autosft.scheduler.planner import StepSpeed
from autosft.scheduler.pruning import PruningRule
from autosft.scheduler.tuning import Slots, StudyRun, run_study, usable_bytes
from autosft.studies import records as records_module
from autosft.studies.records import CommandKind, Records, open_records
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import (
    AttemptEnd,
    StopReason,
    TrainingSettings,
    TrialEvent,
    TrialJob,
    TrialState,
)
from tests.plans import memory_estimate
from tests.scheduler.devices import GIB, gpu
from tests.studies.study_examples import PINNED, driver, spec
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Fault, Script

pytestmark = pytest.mark.usefixtures("quick_records")

NUM_TRIALS = 4
#: Four lost attempts without an evaluation would fail a trial, which is another story.
MAX_LOSSES = 3

LARGE = gpu(0, free_bytes=20 * GIB)
#: Too small for a trial alone: two of them take one together.
SMALL = [
    dataclasses.replace(gpu(index, free_bytes=5 * GIB, flops=5e13), name="Small GPU", node="b")
    for index in (1, 2)
]
DEVICES = [LARGE, *SMALL]
#: A device that was not there at the start.
LATE = gpu(3, free_bytes=20 * GIB)


def memory(recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile) -> MemoryEstimate:
    """4 GiB of state, split over shards, and a quarter GiB an example."""
    shards = recipe.data_parallel if recipe.sharding is Sharding.FSDP else 1
    need = 4 * GIB // shards + micro_batch * GIB // 4
    return dataclasses.replace(
        memory_estimate(), need=ByteRange(median_bytes=need, upper_bytes=need + GIB // 2), outside_bytes=GIB
    )


def speed(
    recipe: StepRecipe, micro_batch: int, what: TrainingSettings, device: DeviceProfile, num_threads: int
) -> StepSpeed:
    return StepSpeed(tokens_per_s=100.0 * micro_batch, run_s=4.0, device_share=0.4)


class Crash(BaseException):
    """The driver is killed here."""


class NoLease:
    def release(self) -> None:
        pass


@dataclass
class World:
    """All that is not the loop: devices, other programs, users, and what is going to happen."""

    records: Records
    study: str
    actions: Iterator[tuple[str, int]]
    faults: Iterator[tuple[Fault | None, int]]
    present: list[DeviceProfile] = field(default_factory=lambda: list(DEVICES))
    num_refusals: int = 0
    num_losses: int = 0
    wants_to_leave: bool = False
    has_calmed: bool = False

    # What the loop asks

    def devices(self) -> ClusterProfile:
        return ClusterProfile(devices=tuple(self.present), driver_version=None, cuda_version=None)

    def acquire(self, device: DeviceProfile, num_bytes: int, **_: object) -> NoLease | None:
        if self.num_refusals > 0:
            self.num_refusals -= 1
            return None
        return NoLease()

    def holders(self, device: DeviceProfile) -> str:
        return "others"

    def stop_requested(self) -> bool:
        return self.wants_to_leave

    def script(self, job: TrialJob) -> Script:
        fault, step = next(self.faults, (None, 1))
        losses = tuple(2.0 + (job.trial * 7 % 5) / 10 - 0.1 * i for i in range(4))
        return Script(num_steps=4, eval_losses=losses, fault=fault, fault_step=step)

    def command(self, kind: CommandKind, trial: int | None = None, **parameters: float) -> None:
        self.records.send_command(self.study, kind, trial=trial, parameters=parameters, now=0.0)

    # What happens

    def happen(self, runner: ChaosRunner) -> list[TrialEvent]:
        action, number = next(self.actions, ("calm", 0))
        trial = number % NUM_TRIALS
        match action:
            case "pause" | "resume" | "stop":
                self.command(CommandKind(action), trial)
            case "pause study" | "resume study" | "stop study":
                self.command(CommandKind(action.removesuffix(" study")))
            case "enqueue":
                self.command(CommandKind.ENQUEUE, weight_decay=round(0.01 * number, 2))
            case "refuse":
                self.num_refusals = number
            case "leave":
                self.wants_to_leave = True
            case "crash":
                raise Crash
            case "join":
                device = [*DEVICES, LATE][number % 4]
                if device not in self.present:
                    self.present.append(device)
            case "part":
                device = [*DEVICES, LATE][number % 4]
                there = [job for job in runner.jobs if device.uuid in job.device_uuids]
                if device in self.present and self.num_losses + len(there) <= MAX_LOSSES:
                    self.present.remove(device)
                    return [self.lose(runner, job) for job in there]
            case "lose" if runner.jobs and self.num_losses < MAX_LOSSES:
                return [self.lose(runner, runner.jobs[number % len(runner.jobs)])]
            case "calm" if not self.has_calmed:
                self.has_calmed = True
                self.command(CommandKind.RESUME)
                self.present = list(DEVICES)
        return []

    def lose(self, runner: ChaosRunner, job: TrialJob) -> TrialEvent:
        self.num_losses += 1
        return runner.fake.lose(job.trial, job.attempt)


class ChaosRunner:
    """A fake runner in a world where things happen; holds the loop to what devices have."""

    def __init__(self, world: World, start_s: float) -> None:
        self.world = world
        self.fake = FakeRunner(world.script, start_s=start_s)
        self.jobs: list[TrialJob] = []

    def run(self, job: TrialJob) -> None:
        assert job.trial not in [one.trial for one in self.jobs], "a trial runs once at a time"
        assert len(job.device_uuids) == job.plan.data_parallel
        batch = job.plan.micro_batch * job.plan.gradient_accumulation * job.plan.data_parallel
        assert batch == job.settings.effective_batch_size
        self.jobs.append(job)
        for uuid in job.device_uuids:
            [device] = [one for one in self.world.present if one.uuid == uuid]
            here = [one for one in self.jobs if uuid in one.device_uuids]
            assert sum(one.plan.estimate.total_bytes for one in here) <= usable_bytes(device)
            assert len(here) == 1 or all(one.plan.data_parallel == 1 for one in here)
        self.fake.run(job)

    def prepare(self, job: TrialJob) -> None:
        self.fake.prepare(job)

    def events(self, timeout_s: float) -> Sequence[TrialEvent]:
        events = self.world.happen(self) or list(self.fake.events(timeout_s))
        over = {(one.trial, one.attempt) for one in events if isinstance(one, AttemptEnd)}
        self.jobs = [one for one in self.jobs if (one.trial, one.attempt) not in over]
        return events

    def stop(self, trial: int, attempt: int, reason: StopReason) -> None:
        self.fake.stop(trial, attempt, reason)

    def now(self) -> float:
        return self.fake.now()

    def close(self, *, grace_s: float) -> None:
        self.fake.close(grace_s=grace_s)


def described(study: str, output: Path, *, pauses: bool) -> StudyRun:
    def share(device: DeviceProfile) -> Slots:
        return Slots(device=device, num_slots=2 if device.name == "Some GPU" else 1, num_threads=1)

    return StudyRun(
        name=study,
        model="model",
        data_dir="data",
        output_dir=output,
        metric="eval_loss",
        minimize=True,
        num_trials=NUM_TRIALS,
        deadline=None,
        pinned=PINNED,
        rule=PruningRule(min_peers=2, pauses=pauses),
        slots=tuple(share(one) for one in DEVICES),
        keep_best=2,
        trust_remote_code=False,
        estimate=memory,
        speed=speed,
        share=share,
    )


ACTIONS = [
    *["nothing"] * 4,
    *["pause", "resume", "stop", "pause study", "resume study", "stop study", "enqueue"],
    *["refuse", "leave", "crash", "join", "part", "lose"],
]
numbers = itertools.count()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Records]:
    with closing(open_records(f"sqlite:///{tmp_path_factory.mktemp('chaos')}/studies.db")) as records:
        yield records


def play(
    database: Records,
    output: Path,
    actions: list[tuple[str, int]],
    faults: list[tuple[Fault | None, int]],
    *,
    pauses: bool,
) -> None:
    """Run a study through all of it, and hold it to its promises."""
    name = f"study-{next(numbers)}"
    world = World(records=database, study=name, actions=iter(actions), faults=iter(faults))
    run = described(name, output, pauses=pauses)
    jobs: list[TrialJob] = []
    for life in itertools.count(1):
        assert life < 60, "it never ends"
        study: StudyRecords = database.open_study(spec(name, num_trials=NUM_TRIALS), now=1e6 * life)
        study.take_over(driver(life), now=1e6 * life)
        runner = ChaosRunner(world, start_s=1e6 * life)
        world.wants_to_leave = False
        try:
            tally = run_study(
                run,
                records=study,
                runner=runner,
                leases=world,
                observe=lambda event: None,
                stop_requested=world.stop_requested,
                devices=world,
            )
        except Crash:
            continue  # without a word: the next driver finds the lease old
        finally:
            jobs += runner.fake.started
        assert runner.fake.num_running == 0
        study.release(now=runner.now())
        if study.num_finished() == NUM_TRIALS:
            break
        for trial in tally.held:
            world.command(CommandKind.RESUME, trial)
    trials = study.trials()
    assert len(trials) == NUM_TRIALS
    assert all(one.state.is_finished for one in trials)
    assert not study.pending_commands()
    assert [one.num_attempts for one in trials] == [
        sum(job.trial == one.number for job in jobs) for one in trials
    ]
    for trial in trials:
        evaluations = [one.evaluation for one in trial.measurements]
        assert evaluations == list(range(1, len(evaluations) + 1))
        ran_through = trial.state is TrialState.COMPLETED and trial.failure is None
        assert not ran_through or len(evaluations) == 4
    stored = database.read_study(name)
    assert stored.trials() == trials


interleavings = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9)), max_size=30)
faults = st.lists(
    st.tuples(st.sampled_from([None, None, Fault.OUT_OF_MEMORY, Fault.NON_FINITE_LOSS]), st.integers(1, 4)),
    max_size=8,
)


@pytest.mark.parametrize(
    "num_examples",
    [pytest.param(25, id="some"), pytest.param(250, id="many", marks=pytest.mark.slow)],
)
def test_whatever_happens_the_number_of_finished_trials_is_exact(
    num_examples: int, database: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module, "refuse_foreign_study", lambda storage, name: None)
    monkeypatch.setattr(Records, "_optuna", lambda self: None)

    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(actions=interleavings, faults=faults, pauses=st.booleans())
    def check(actions: list[tuple[str, int]], faults: list[tuple[Fault | None, int]], pauses: bool) -> None:
        play(database, tmp_path, actions, faults, pauses=pauses)

    check()
