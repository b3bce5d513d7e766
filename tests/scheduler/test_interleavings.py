"""A study ends with exactly the trials that were asked for, whatever happens in between.

A state machine over generated interleavings of faults, users' commands, devices that join and leave, other
programs in the way, reports that come late or twice, and drivers that die anywhere, before and behind each
commit; on the fake runner's virtual clock over real records in SQLite.  The loop runs in a thread in lockstep
with it, so that between any two rounds what is recorded can be looked at, and things can happen.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from autosft.profiles.hardware import ClusterProfile, DeviceProfile
from autosft.profiles.recipe import ByteRange, MemoryEstimate, Sharding, StepRecipe
from autosft.scheduler.planner import StepSpeed
from autosft.scheduler.pruning import PruningRule
from autosft.scheduler.tuning import Slots, StudyFailedError, StudyRun, run_study, usable_bytes
from autosft.studies import records as records_module
from autosft.studies import tables
from autosft.studies.lease import Lease
from autosft.studies.records import CommandKind, Records, open_records
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import (
    AttemptEnd,
    StopReason,
    TrainingSettings,
    TrialEvent,
    TrialJob,
    TrialRecord,
    TrialState,
)
from tests.plans import memory_estimate
from tests.scheduler.devices import GIB, gpu
from tests.studies.study_examples import PINNED, driver, spec
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Fault, Script

NUM_TRIALS = 4
#: In so many rounds everything is over once nothing happens any more.
MANY_ROUNDS = 2000
#: Marks of what `make faults` runs, for an hour on two busy cores.
LONG = [pytest.mark.faults, pytest.mark.timeout(7200)]

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


class Crash(BaseException):
    """The driver is killed here."""


class NoLease:
    def release(self) -> None:
        pass


@dataclass
class World:
    """All that is not the loop: devices, other programs, and what has been decided to happen."""

    present: list[DeviceProfile] = field(default_factory=lambda: list(DEVICES))
    num_refusals: int = 0
    wants_to_leave: bool = False
    has_heard: bool = False  # the driver, that somebody wants it to leave
    faults: deque[tuple[Fault | None, int]] = field(default_factory=deque)  # of the next attempts
    crash_in: int | None = None  # transactions from now
    crashes_before_commit: bool = False

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
        self.crash_in = None

    def strikes(self) -> bool:
        """Whether the driver is killed around the transaction that begins now."""
        strikes = self.crash_in == 0
        if self.crash_in is not None:
            self.crash_in = None if strikes else self.crash_in - 1
        return strikes


def hangs_for(job: TrialJob, *, has_begun: bool) -> float:
    return 5.0


class ChaosRunner:
    """A fake runner in a world where things happen; holds the loop to what devices have."""

    def __init__(self, world: World, start_s: float, park: Callable[[], None]) -> None:
        self.world = world
        self.park = park
        self.fake = FakeRunner(world.script, start_s=start_s, stop_grace_s=3.0, hang_limit_s=hangs_for)
        self.jobs: list[TrialJob] = []
        self.due: list[TrialEvent] = []  # what happens before anything that was scripted
        self.told: list[TrialEvent] = []
        self.is_dead = False

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
        self.park()
        if self.is_dead:
            raise Crash
        events = self.due or list(self.fake.events(timeout_s))
        self.due = []
        self.told += events
        over = {(one.trial, one.attempt) for one in events if isinstance(one, AttemptEnd)}
        self.jobs = [one for one in self.jobs if (one.trial, one.attempt) not in over]
        return events

    def lose(self, job: TrialJob) -> None:
        ends = [(one.trial, one.attempt) for one in self.due if isinstance(one, AttemptEnd)]
        if (job.trial, job.attempt) not in ends:
            self.due.append(self.fake.lose(job.trial, job.attempt))

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


class Life:
    """One driver, from its start to its end, in a thread that runs only while `go_on` waits for it."""

    def __init__(self, number: int, world: World, database: Records, run: StudyRun) -> None:
        self.runner = ChaosRunner(world, start_s=1e6 * number, park=self._park)
        self.is_over = False
        self.study: StudyRecords | None = None
        self._number, self._world, self._database, self._run = number, world, database, run
        self._error: BaseException | None = None
        self._go, self._has_parked = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._live, daemon=True).start()

    def go_on(self) -> None:
        """Run until the loop asks for events again, or ends."""
        self._go.release()
        self._has_parked.acquire()
        if self._error is not None:
            raise self._error

    def _park(self) -> None:
        self._has_parked.release()
        self._go.acquire()

    def _live(self) -> None:
        self._go.acquire()
        try:
            self._tune()
        except (Crash, StudyFailedError):
            pass  # without a word: the next driver finds the lease old
        except BaseException as error:
            self._error = error
        self.is_over = True
        self._has_parked.release()

    def _tune(self) -> None:
        now = 1e6 * self._number
        spec_now = spec(self._run.name, num_trials=NUM_TRIALS)
        self.study = study = self._database.open_study(spec_now, now=now)
        study.take_over(driver(self._number), now=now)
        tally = run_study(
            self._run,
            records=study,
            runner=self.runner,
            leases=self._world,
            observe=lambda event: None,
            stop_requested=self._world.stop_requested,
            devices=self._world,
        )
        assert self.runner.fake.num_running == 0
        held = {one.number for one in study.unfinished() if one.number in tally.held}
        is_done = study.num_finished() + len(held) == NUM_TRIALS
        assert is_done or self._world.has_heard or tally.was_stopped, "it has left work behind"
        study.release(now=self.runner.now())


class Interleavings(RuleBasedStateMachine):
    """What may happen to a study; class attributes are set by the test."""

    database: Records
    folder: Path
    world: World  # of the machine that runs

    @initialize(pauses=st.booleans())
    def begin(self, pauses: bool) -> None:
        type(self).world = self.world = World()
        self.study = "study"
        self.described = described(self.study, self.folder, pauses=pauses)
        self.started: list[TrialJob] = []
        self.told: list[TrialEvent] = []
        self.over: dict[int, TrialRecord] = {}
        self.num_lives = 0
        self.begin_life()

    def begin_life(self) -> None:
        self.num_lives += 1
        self.world.wants_to_leave = self.world.has_heard = False
        self.life = Life(self.num_lives, self.world, self.database, self.described)
        self.life.go_on()

    def go_on(self) -> None:
        """Have the loop take one more turn; a next driver follows one that is over."""
        if not self.life.is_over:
            self.life.go_on()
        if self.life.is_over:
            self.started += self.life.runner.fake.started
            self.told += self.life.runner.told
            self.begin_life()

    @property
    def runner(self) -> ChaosRunner:
        return self.life.runner

    def command(self, kind: CommandKind, trial: int | None = None, **parameters: float) -> None:
        self.database.send_command(self.study, kind, trial=trial, parameters=parameters, now=0.0)

    # What happens

    @rule(rounds=st.integers(1, 4))
    def let_it_run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.go_on()

    @rule(
        fault=st.sampled_from([Fault.OUT_OF_MEMORY, Fault.NON_FINITE_LOSS, Fault.ERROR, Fault.HANG, None]),
        step=st.integers(1, 4),
    )
    def fail_an_attempt_to_come(self, fault: Fault | None, step: int) -> None:
        self.world.faults.append((fault, step))

    @rule(kind=st.sampled_from(["pause", "resume", "stop"]), trial=st.integers(0, NUM_TRIALS - 1))
    def ask_of_a_trial(self, kind: str, trial: int) -> None:
        self.command(CommandKind(kind), trial)
        self.go_on()

    @rule(kind=st.sampled_from(["pause", "resume", "stop"]))
    def ask_of_the_study(self, kind: str) -> None:
        self.command(CommandKind(kind))
        self.go_on()

    @rule(number=st.integers(0, 9))
    def enqueue(self, number: int) -> None:
        self.command(CommandKind.ENQUEUE, weight_decay=round(0.01 * number, 2))
        self.go_on()

    @rule(number=st.integers(1, 9))
    def hold_devices(self, number: int) -> None:
        self.world.num_refusals = number

    @rule()
    def leave(self) -> None:
        self.world.wants_to_leave = True
        self.go_on()

    @rule()
    def kill_the_driver(self) -> None:
        self.runner.is_dead = True
        self.go_on()

    @rule(number=st.integers(0, 8), before=st.booleans())
    def kill_the_driver_at_a_commit(self, number: int, before: bool) -> None:
        self.world.crash_in, self.world.crashes_before_commit = number, before
        self.go_on()

    @rule(number=st.integers(0, 3))
    def have_a_device_join(self, number: int) -> None:
        device = [*DEVICES, LATE][number]
        if device not in self.world.present:
            self.world.present.append(device)
        self.go_on()

    @rule(number=st.integers(0, 3))
    def take_a_device(self, number: int) -> None:
        device = [*DEVICES, LATE][number]
        if device in self.world.present:
            self.world.present.remove(device)
            for job in [one for one in self.runner.jobs if device.uuid in one.device_uuids]:
                self.runner.lose(job)
        self.go_on()

    @precondition(lambda self: self.runner.jobs)
    @rule(number=st.integers(0, 9))
    def lose_a_worker(self, number: int) -> None:
        self.runner.lose(self.runner.jobs[number % len(self.runner.jobs)])
        self.go_on()

    @precondition(lambda self: self.told or self.runner.told)
    @rule(number=st.integers(0, 99))
    def tell_again(self, number: int) -> None:
        """Deliver a report a second time, maybe one of an attempt or a driver that is long over."""
        told = [*self.told, *self.runner.told]
        self.runner.due.append(told[-1 - number % len(told)])
        self.go_on()

    # What holds all the while

    @invariant()
    def what_is_recorded_holds(self) -> None:
        """The tables say what the driver knows, and no result is ever changed or taken back."""
        if not hasattr(self, "life"):
            return
        rows = self.rows()
        assert sum(one.state != TrialState.FAILED.value for one in rows) <= NUM_TRIALS
        for number, row in self.over.items():
            assert rows[number] == row, "a trial that was over has changed"
        self.over = {one.number: one for one in rows if TrialState(one.state).is_over}
        if self.life.is_over:
            return
        assert self.life.study is not None
        known = [
            (one.number, one.state.value, one.num_attempts, one.value, len(one.measurements))
            for one in self.life.study.trials()
        ]
        assert [tuple(one) for one in rows] == known
        running = {(one.number, one.num_attempts) for one in rows if one.state == TrialState.RUNNING.value}
        assert {(one.trial, one.attempt) for one in self.runner.jobs} == running

    def rows(self) -> Sequence[sa.Row[tuple[int, str, int, float, int]]]:
        """Return of each trial: number, state, attempts, value, evaluations; as another process reads it."""
        trials, attempts, measurements = tables.trials, tables.attempts, tables.measurements
        num_attempts = sa.select(sa.func.count()).where(attempts.c.trial_id == trials.c.id).scalar_subquery()
        num_evaluations = (
            sa.select(sa.func.count(measurements.c.evaluation.distinct()))
            .select_from(measurements.join(attempts, measurements.c.attempt_id == attempts.c.id))
            .where(attempts.c.trial_id == trials.c.id, measurements.c.evaluation > 0)
            .scalar_subquery()
        )
        query = sa.select(
            trials.c.number,
            trials.c.state,
            num_attempts.label("num_attempts"),
            trials.c.value,
            num_evaluations.label("num_evaluations"),
        ).order_by(trials.c.number)
        with self.database._engine.connect() as connection:
            return connection.execute(query).all()

    def teardown(self) -> None:
        """Let it come to its end undisturbed, and hold it to its promises."""
        if not hasattr(self, "life"):
            return
        try:
            self.come_to_an_end()
            self.what_is_recorded_holds()
            self.all_is_done_once()
        finally:
            empty(self.database)

    def come_to_an_end(self) -> None:
        self.world.calm_down()
        self.command(CommandKind.RESUME)
        for trial in self.database.read_study(self.study).trials():
            self.command(CommandKind.RESUME, trial.number)
        for _ in range(MANY_ROUNDS):
            self.go_on()
            if self.life.is_over and self.database.read_study(self.study).num_finished() == NUM_TRIALS:
                return
        raise AssertionError("it never ends")

    def all_is_done_once(self) -> None:
        study = self.database.read_study(self.study)
        trials = study.trials()
        assert study.num_finished() == NUM_TRIALS
        assert all(one.state.is_finished or one.state is TrialState.FAILED for one in trials)
        assert not study.pending_commands()
        attempts = [(job.trial, job.attempt) for job in [*self.started, *self.runner.fake.started]]
        assert len(set(attempts)) == len(attempts), "an attempt was started twice"
        assert set(attempts) <= {(one.trial, one.number) for one in study.attempts()}
        assert all(one.ended_at is not None for one in study.attempts())
        for trial in trials:
            evaluations = [one.evaluation for one in trial.measurements]
            assert evaluations == list(range(1, len(evaluations) + 1))
            ran_through = trial.state is TrialState.COMPLETED and trial.failure is None
            assert not ran_through or len(evaluations) == 4


# --- the test -----------------------------------------------------------------------------------------


def empty(database: Records) -> None:
    """Delete every row, so that one database serves all studies and none is slower than the first."""
    with database._engine.begin() as connection:
        for table in reversed(tables.metadata.sorted_tables):
            connection.execute(sa.delete(table))


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have drivers die around their commits, when the world says so."""
    transaction = Lease.transaction

    @contextmanager
    def around(lease: Lease) -> Iterator[sa.Connection]:
        strikes = Interleavings.world.strikes()
        with transaction(lease) as connection:
            yield connection
            if strikes and Interleavings.world.crashes_before_commit:
                raise Crash
        if strikes:
            raise Crash

    monkeypatch.setattr(Lease, "transaction", around)
    monkeypatch.setattr(records_module, "refuse_foreign_study", lambda storage, name: None)
    monkeypatch.setattr(Records, "_optuna", lambda self: None)


@pytest.mark.usefixtures("mortal", "quick_records")
@pytest.mark.parametrize(
    "num_examples",
    [
        pytest.param(15, id="some"),
        pytest.param(100, id="more", marks=pytest.mark.slow),
        pytest.param(4000, id="thousands", marks=[pytest.mark.slow, *LONG]),
    ],
)
def test_whatever_happens_the_number_of_finished_trials_is_exact(num_examples: int, tmp_path: Path) -> None:
    with closing(open_records(f"sqlite:///{tmp_path}/studies.db")) as database:
        Interleavings.database, Interleavings.folder = database, tmp_path
        run_state_machine_as_test(
            Interleavings,
            settings=settings(
                max_examples=num_examples,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
