"""A study whose memory nothing predicts, on a virtual clock: its first trial measures itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from autosft.profiles.hardware.device import DeviceProfile
from autosft.profiles.recipe import ByteRange, Checkpointing, MemoryEstimate, Sharding, StepRecipe
from autosft.scheduler.decide.no_result import why_no_result
from autosft.scheduler.decide.planner import StepSpeed
from autosft.scheduler.events import Note, Waiting
from autosft.scheduler.loop.tuning import run_study
from autosft.scheduler.setup.learned import learned_so_far
from autosft.scheduler.study_run import Slots
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import TrainingSettings, TrialJob, TrialState
from tests.plans import memory_estimate
from tests.scheduler.decide import test_planner
from tests.scheduler.devices import GIB, gpu
from tests.scheduler.study_loop import GOOD, FakeLeases, NoLease, Watcher, opened, states, study_run
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Fault, Script

pytestmark = pytest.mark.usefixtures("quick_records")

MIB = 1 << 20


def guessed(recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile) -> MemoryEstimate:
    """Guesses 1 GiB and a quarter an example (less with checkpointing), and bounds nothing."""
    row = GIB // (8 if recipe.checkpointing is Checkpointing.OFF else 32)
    need = GIB + micro_batch * row
    if recipe.sharding is Sharding.FSDP:
        need //= recipe.data_parallel
    return dataclasses.replace(
        memory_estimate(),
        need=ByteRange(median_bytes=need, upper_bytes=need),
        outside_bytes=256 * MIB,
        untraced=("the step (it reads a number)",),
        longest=seq_len,
        floor_bytes=GIB // 2,
    )


def speed(
    recipe: StepRecipe, micro_batch: int, what: TrainingSettings, device: DeviceProfile, num_threads: int
) -> StepSpeed:
    """Faster with the micro batch up to 8, and a third of a device's time."""
    alone = test_planner.speed(recipe, micro_batch, what, device, num_threads)
    return dataclasses.replace(alone, run_s=10.0, device_share=0.3)


@dataclass
class Machine:
    """What trials really take, the end of those that take more than their cap, and who ran beside whom."""

    row_bytes: int = GIB
    fixed_bytes: int = 2 * GIB
    eval_row_bytes: int = 0
    is_evaluation_seen: bool = True  # in the peaks that it reports
    shares: Callable[[TrialJob], int] = lambda job: 1
    together: list[tuple[int, ...]] = field(default_factory=list)
    running: dict[int, TrialJob] = field(default_factory=dict)

    def taken_bytes(self, job: TrialJob) -> int:
        row = self.row_bytes // (1 if job.plan.checkpointing is Checkpointing.OFF else 4)
        return self.fixed_bytes // self.shares(job) + job.plan.micro_batch * row

    def script(self, job: TrialJob) -> Script:
        if job.pinned.eval_micro_batch * self.eval_row_bytes > job.plan.memory_cap_bytes:
            return dataclasses.replace(GOOD, fault=Fault.EVALUATION_OUT_OF_MEMORY, fault_step=1)
        if self.taken_bytes(job) > job.plan.memory_cap_bytes:
            return dataclasses.replace(GOOD, fault=Fault.OUT_OF_MEMORY, fault_step=1)
        peak_bytes = self.taken_bytes(job)
        if self.is_evaluation_seen:
            peak_bytes = max(peak_bytes, job.pinned.eval_micro_batch * self.eval_row_bytes)
        return dataclasses.replace(GOOD, peak_bytes=peak_bytes)


def one_gpu(gib: int = 40, *, num_slots: int = 2) -> Slots:
    return Slots(device=gpu(free_bytes=gib * GIB), num_slots=num_slots, num_threads=1)


def tune(
    records: StudyRecords, folder: Path, machine: Machine, *slots: Slots, num_trials: int, **changes: object
) -> tuple[FakeRunner, Watcher]:
    run = study_run(folder, num_trials=num_trials, slots=slots, estimate=guessed, speed=speed, **changes)
    runner, watcher = FakeRunner(machine.script), Watcher()
    run_study(
        run,
        records=records,
        runner=runner,
        leases=FakeLeases(),
        observe=watcher,
        stop_requested=lambda: False,
    )
    return runner, watcher


def rungs(runner: FakeRunner) -> list[tuple[int, bool]]:
    """Return micro batch and checkpointing of every attempt, in order."""
    return [
        (item.plan.micro_batch, item.plan.checkpointing is not Checkpointing.OFF) for item in runner.started
    ]


def overlaps(records: StudyRecords, trial: int) -> list[int]:
    """Return the trials that ran on a device of this trial while it ran."""
    attempts = records.attempts()
    mine = [attempt for attempt in attempts if attempt.trial == trial]
    return [
        other.trial
        for other in attempts
        for item in mine
        if other.trial != trial
        and set(other.device_uuids) & set(item.device_uuids)
        and other.started_at < (item.ended_at or 0)
        and item.started_at < (other.ended_at or 0)
    ]


def test_the_first_trial_runs_alone_and_later_ones_share_by_what_it_took(
    database: Path, tmp_path: Path
) -> None:
    machine = Machine()  # 2 GiB and one an example: 10 at micro batch 8
    with opened(database) as records:
        runner, watcher = tune(records, tmp_path, machine, one_gpu(), num_trials=5)
        assert states(records) == {TrialState.COMPLETED: 5}
        first, *later = runner.started
        assert first.plan.measures_itself
        assert first.plan.booked_bytes == 40 * GIB
        assert overlaps(records, 0) == []
        assert not any(item.plan.measures_itself for item in later)
        took = machine.taken_bytes(first)
        for item in later:
            assert took < item.plan.memory_cap_bytes < 1.2 * took
            assert item.plan.estimate.untraced == ()
            assert item.plan.micro_batch == first.plan.micro_batch
        assert overlaps(records, 1), "measured trials share a device"
        told = [item.message for item in watcher.of(Note) if isinstance(item, Note)]
        assert any("Trial 0 has measured its memory" in item for item in told)


def test_a_measurement_outlives_its_study(database: Path, tmp_path: Path) -> None:
    machine = Machine()
    with opened(database) as records:
        tune(records, tmp_path, machine, one_gpu(), num_trials=1)
        fingerprint = records.spec.model_fingerprint
    measured = learned_so_far(f"sqlite:///{database}").measured_memory(fingerprint)
    assert learned_so_far(f"sqlite:///{database}").measured_memory("another model").runs == ()
    with opened(database, now=10.0, number=2) as records:
        runner, _ = tune(records, tmp_path, machine, one_gpu(), num_trials=4, measured=measured)
        assert [item.plan.measures_itself for item in runner.started] == [False] * 3
        assert overlaps(records, 1)


LADDERS = {
    # fixed GiB, MiB an example, GiB of the device: the attempts of the first trial
    "everything fits": (2, 100, 40, [(8, False)]),
    "half the rows": (2, 2000, 16, [(8, False), (4, False)]),
    "down to one row": (14, 1000, 16, [(8, False), (4, False), (2, False), (1, False)]),
    "one row with checkpointing": (
        15,
        2000,
        16,
        [(8, False), (4, False), (2, False), (1, False), (1, True)],
    ),
    "nothing": (
        30,
        1,
        16,
        [(8, False), (4, False), (2, False), (1, False), (1, True)],
    ),
}


@pytest.mark.parametrize("name", LADDERS)
def test_what_runs_out_of_memory_goes_down_in_rows(database: Path, tmp_path: Path, name: str) -> None:
    fixed_gib, row_mib, device_gib, expect = LADDERS[name]
    machine = Machine(fixed_bytes=fixed_gib * GIB, row_bytes=row_mib * MIB)
    with opened(database) as records:
        if name == "nothing":
            tune(records, tmp_path, machine, one_gpu(device_gib), num_trials=2)
            assert "ran out of memory" in why_no_result(records.trials(), is_time_over=False)
            assert states(records)[TrialState.INFEASIBLE] == 2
            assert records.trial(1).num_attempts == 0, "what is known to run out is not tried again"
            [one, *_] = records.trials()
            assert one.num_attempts == len(expect)
            return
        runner, _ = tune(records, tmp_path, machine, one_gpu(device_gib), num_trials=3)
        assert rungs(runner)[: len(expect)] == expect
        assert states(records) == {TrialState.COMPLETED: 3}
        assert records.trial(0).num_attempts == len(expect)
        assert [trial.num_attempts for trial in records.trials()[1:]] == [1, 1], (
            "what ran out is not tried again"
        )


def test_evaluating_has_a_rung_of_its_own(database: Path, tmp_path: Path) -> None:
    """Two examples at a time fit; what is trained with stays as it is."""
    machine = Machine(eval_row_bytes=14 * GIB)
    with opened(database) as records:
        runner, _ = tune(records, tmp_path, machine, one_gpu(), num_trials=3)
        first = [item for item in runner.started if item.trial == 0]
        assert [item.pinned.eval_micro_batch for item in first] == [8, 4, 2]
        assert len({item.plan.micro_batch for item in first}) == 1
        assert all(item.pinned.eval_micro_batch == 2 for item in runner.started if item.trial)
        assert states(records) == {TrialState.COMPLETED: 3}
        assert [trial.num_attempts for trial in records.trials()] == [3, 1, 1]
    with opened(database, now=10.0, number=2) as records:
        runner, _ = tune(records, tmp_path, machine, one_gpu(), num_trials=4)
        assert [item.pinned.eval_micro_batch for item in runner.started] == [2], "a restart keeps it"


def test_evaluating_that_takes_more_than_was_measured_comes_to_an_end(database: Path, tmp_path: Path) -> None:
    """The peaks that trials report leave evaluating out: caps by them are too small whatever is tried."""
    machine = Machine(eval_row_bytes=14 * GIB, is_evaluation_seen=False)
    with opened(database) as records:
        tune(records, tmp_path, machine, one_gpu(), num_trials=4)
        assert states(records) == {TrialState.COMPLETED: 4}
        assert max(trial.num_attempts for trial in records.trials()) <= 5


def test_a_loss_that_takes_more_than_was_predicted(database: Path, tmp_path: Path) -> None:
    """It runs out under its bound; what it takes is measured with fewer rows, and counts at once."""

    def predicted(
        recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile
    ) -> MemoryEstimate:
        made = guessed(recipe, micro_batch, seq_len, device)
        need = made.need.median_bytes
        bound = ByteRange(median_bytes=need, upper_bytes=need + 64 * MIB)
        return dataclasses.replace(made, need=bound, allocated=bound, untraced=(), uncalibrated_bytes=need)

    machine = Machine(fixed_bytes=GIB, row_bytes=500 * MIB)
    run = study_run(tmp_path, num_trials=4, slots=(one_gpu(num_slots=1),), estimate=predicted, speed=speed)
    with opened(database) as records:
        runner, watcher = FakeRunner(machine.script), Watcher()
        run_study(
            run,
            records=records,
            runner=runner,
            leases=FakeLeases(),
            observe=watcher,
            stop_requested=lambda: False,
        )
        ran_out, measured, *others = runner.started
        assert not ran_out.plan.measures_itself
        assert measured.plan.measures_itself
        assert measured.plan.micro_batch == ran_out.plan.micro_batch // 2
        assert "ran out of" in measured.plan.estimate.untraced[0]
        assert states(records) == {TrialState.COMPLETED: 4}
        for other in others:
            assert not other.plan.measures_itself
            assert other.plan.memory_cap_bytes >= machine.taken_bytes(other)
            assert "measured" in other.plan.estimate.method


def test_trials_that_share_a_study_do_not_repeat_what_ran_out(database: Path, tmp_path: Path) -> None:
    """Two start at once on two devices; both run out at the first rung, and neither goes back to it."""
    machine = Machine(fixed_bytes=2 * GIB, row_bytes=GIB)
    slots = [dataclasses.replace(one_gpu(10), device=gpu(index, free_bytes=10 * GIB)) for index in (0, 1)]
    with opened(database) as records:
        runner, _ = tune(records, tmp_path, machine, *slots, num_trials=6)
        first = runner.started[0].plan.micro_batch
        assert sum(item.plan.micro_batch == first for item in runner.started) <= 2
        assert states(records) == {TrialState.COMPLETED: 6}


def test_what_fits_no_device_measures_itself_on_several(database: Path, tmp_path: Path) -> None:
    machine = Machine(
        fixed_bytes=14 * GIB,
        row_bytes=GIB,
        shares=lambda job: job.plan.data_parallel if job.plan.sharding is Sharding.FSDP else 1,
    )
    slots = [Slots(device=gpu(index, free_bytes=12 * GIB), num_slots=1, num_threads=1) for index in range(2)]
    with opened(database) as records:
        runner, _ = tune(records, tmp_path, machine, *slots, num_trials=3)
        last = [item for item in runner.started if item.trial == 0][-1]
        assert last.plan.measures_itself
        assert last.plan.sharding is Sharding.FSDP
        assert len(last.device_uuids) == 2
        assert overlaps(records, 0) == []
        assert states(records) == {TrialState.COMPLETED: 3}
        third = records.trial(2)
        assert third.num_attempts == 1
        assert third.plan is not None
        assert not third.plan.measures_itself


@dataclass
class SharedLeases:
    """What two studies hold of one device."""

    free_bytes: int

    def acquire(self, device: DeviceProfile, num_bytes: int, **_: object) -> Held | None:
        if num_bytes > self.free_bytes:
            return None
        self.free_bytes -= num_bytes
        return Held(self, num_bytes)

    def available_bytes(self, device: DeviceProfile) -> int:
        return self.free_bytes

    def holders(self, device: DeviceProfile) -> str:
        return "another study holds it"

    def are_held(self, device: DeviceProfile) -> bool:
        return True

    def most_bytes(self, device: DeviceProfile) -> int:
        return device.total_bytes


@dataclass
class Held(NoLease):
    leases: SharedLeases
    num_bytes: int

    def release(self) -> None:
        self.leases.free_bytes += self.num_bytes


@pytest.mark.parametrize(
    ("other_gib", "expect_gib"),
    [(0, 40), (30, 10), (39, None)],
    ids=["free", "takes what is left", "waits where that is less than is guessed"],
)
def test_two_studies_on_one_device(
    database: Path, tmp_path: Path, other_gib: int, expect_gib: int | None
) -> None:
    """Another study's lease is given back at the first wait."""
    leases = SharedLeases(40 * GIB)
    other = leases.acquire(gpu(), other_gib * GIB)
    assert other is not None
    watcher, machine = Watcher(), Machine(row_bytes=100 * MIB)
    runner = FakeRunner(machine.script)

    def observe(event: object) -> None:
        watcher(event)  # type: ignore[arg-type]
        if isinstance(event, Waiting):
            other.release()

    run = study_run(tmp_path, num_trials=2, slots=(one_gpu(),), estimate=guessed, speed=speed)
    with opened(database) as records:
        run_study(
            run,
            records=records,
            runner=runner,
            leases=leases,
            observe=observe,
            stop_requested=lambda: False,
        )
        assert states(records) == {TrialState.COMPLETED: 2}
    assert bool(watcher.of(Waiting)) is (expect_gib is None)
    assert runner.started[0].plan.booked_bytes == (expect_gib or 40) * GIB


def test_a_device_that_comes_back_is_not_measured_again(database: Path, tmp_path: Path) -> None:
    """What Ctrl+C ended after its rehearsal has measured its memory."""
    machine, calls = Machine(), iter(range(1000))
    with opened(database) as records:
        runner, watcher = FakeRunner(machine.script), Watcher()
        run_study(
            study_run(tmp_path, num_trials=2, slots=(one_gpu(),), estimate=guessed, speed=speed),
            records=records,
            runner=runner,
            leases=FakeLeases(),
            observe=watcher,
            stop_requested=lambda: next(calls) > 3,
        )
        fingerprint = records.spec.model_fingerprint
        assert states(records)[TrialState.WAITING] >= 1
    measured = learned_so_far(f"sqlite:///{database}").measured_memory(fingerprint)
    with opened(database, now=10.0, number=2) as records:
        runner, _ = tune(records, tmp_path, machine, one_gpu(), num_trials=2, measured=measured)
        assert not any(item.plan.measures_itself for item in runner.started)
        assert states(records) == {TrialState.COMPLETED: 2}
