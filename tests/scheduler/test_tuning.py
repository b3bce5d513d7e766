"""The whole loop on a virtual clock: real records in SQLite, a fake runner, fake leases."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from autosft.profiles.errors import UserError
from autosft.profiles.hardware import ClusterProfile, DeviceProfile
from autosft.profiles.recipe import ByteRange, MemoryEstimate, StepRecipe
from autosft.scheduler.events import Note, StudyEvent, TrialStarted, Waiting
from autosft.scheduler.learned import learned_so_far
from autosft.scheduler.outcome import MAX_LOST_ATTEMPTS
from autosft.scheduler.planner import StepSpeed
from autosft.scheduler.pruning import PruningRule
from autosft.scheduler.tuning import Slots, StudyFailedError, StudyRun, run_study
from autosft.studies.records import CommandKind, open_records
from autosft.studies.space import Fixed
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import FailureKind, StopReason, TrainingSettings, TrialJob, TrialState
from tests.scheduler.devices import GIB, gpu
from tests.scheduler.test_planner import memory
from tests.studies.study_examples import PINNED, driver, space, spec
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Fault, Script

pytestmark = pytest.mark.usefixtures("quick_records")

LOSSES = (2.0, 1.8, 1.6, 1.5)
GOOD = Script(num_steps=8, eval_losses=LOSSES)


class NoLease:
    """A lease that need not be given back."""

    def release(self) -> None:
        pass


@dataclass
class FakeLeases:
    """Refuses the first `num_refusals` requests; counts what is held at once."""

    num_refusals: int = 0
    asked: list[int] = field(default_factory=list)

    def acquire(
        self, device: DeviceProfile, num_bytes: int, *, num_threads: int, study: str, trial: int, until: float
    ) -> NoLease | None:
        self.asked.append(num_bytes)
        if len(self.asked) <= self.num_refusals:
            return None
        return NoLease()

    def holders(self, device: DeviceProfile) -> str:
        return "Study other holds 9.8 GiB until about 14:05."


def speed(
    recipe: StepRecipe, micro_batch: int, what: TrainingSettings, device: DeviceProfile, num_threads: int
) -> StepSpeed:
    return StepSpeed(tokens_per_s=1000.0 * micro_batch, run_s=10.0)


def study_run(output: Path, *, num_trials: int, num_slots: int = 2, **changes: object) -> StudyRun:
    run = StudyRun(
        name="study",
        model="model",
        data_dir="data",
        output_dir=output,
        metric="eval_loss",
        minimize=True,
        num_trials=num_trials,
        deadline=None,
        pinned=PINNED,
        rule=PruningRule(),
        slots=tuple(
            Slots(device=gpu(index, free_bytes=80 * GIB), num_slots=1, num_threads=1)
            for index in range(num_slots)
        ),
        keep_best=2,
        trust_remote_code=False,
        estimate=memory,
        speed=speed,
    )
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


@contextmanager
def opened(path: Path, *, now: float = 0.0, number: int = 1) -> Iterator[StudyRecords]:
    with closing(open_records(f"sqlite:///{path}")) as records:
        study = records.open_study(spec(num_trials=30), now=now)
        study.take_over(driver(number), now=now)
        yield study
        study.release(now=now)


@dataclass
class Watcher:
    events: list[StudyEvent] = field(default_factory=list)

    def __call__(self, event: StudyEvent) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[StudyEvent]:
        return [one for one in self.events if isinstance(one, kind)]


def tune(
    run: StudyRun,
    records: StudyRecords,
    script: Callable[[TrialJob], Script],
    *,
    leases: FakeLeases | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[FakeRunner, Watcher]:
    runner, watcher = FakeRunner(script), Watcher()
    run_study(
        run,
        records=records,
        runner=runner,
        leases=leases or FakeLeases(),
        observe=watcher,
        stop_requested=stop_requested,
    )
    assert runner.num_running == 0
    return runner, watcher


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "studies.db"


def states(records: StudyRecords) -> Counter[TrialState]:
    return Counter(one.state for one in records.trials())


def test_a_study_ends_with_as_many_finished_trials_as_were_asked_for(database: Path, tmp_path: Path) -> None:
    with opened(database) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=5), records, lambda job: GOOD)
        assert states(records) == {TrialState.COMPLETED: 5}
        assert {job.device_uuids for job in runner.started} == {("GPU-0",), ("GPU-1",)}


def test_running_it_again_adds_only_what_is_missing(database: Path, tmp_path: Path) -> None:
    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=3), records, lambda job: GOOD)
    with opened(database, now=10.0, number=2) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=3), records, lambda job: GOOD)
        assert runner.started == []
        runner, _ = tune(study_run(tmp_path, num_trials=4), records, lambda job: GOOD)
        assert [job.trial for job in runner.started] == [3]


def test_hopeless_trials_are_stopped_and_the_default_is_not(database: Path, tmp_path: Path) -> None:
    def script(job: TrialJob) -> Script:
        hopeless = job.trial in (0, 4)
        return Script(num_steps=8, eval_losses=(9.0, 9.0, 9.0, 9.0) if hopeless else LOSSES)

    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=5, num_slots=1), records, script)
        assert [one.state for one in records.trials()] == [TrialState.COMPLETED] * 4 + [TrialState.STOPPED]
        assert records.trial(4).measurements[-1].evaluation == 1


def test_how_fast_a_trial_was_is_kept_for_later_plans(database: Path, tmp_path: Path) -> None:
    # 500 tokens a second; the second prediction is corrected by the first trial
    long = Script(num_steps=40, step_s=0.2, eval_losses=LOSSES)
    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=2, num_slots=1), records, lambda job: long)
    kept = learned_so_far(f"sqlite:///{database}").speed.rows
    cold = [one.ratio for one in kept]
    assert len(cold) == 2
    assert cold[0] == pytest.approx(cold[1])
    assert kept[0].kind.device_name == "Some GPU"
    short = Script(num_steps=8, eval_losses=LOSSES)
    with opened(database, now=100.0, number=2) as records:
        tune(study_run(tmp_path, num_trials=3, num_slots=1), records, lambda job: short)
    assert len(learned_so_far(f"sqlite:///{database}").speed.rows) == 2, "a short one teaches nothing"


def test_out_of_memory_is_planned_again_smaller_and_learned(database: Path, tmp_path: Path) -> None:
    def script(job: TrialJob) -> Script:
        too_large = job.plan.micro_batch > 2
        return dataclasses.replace(GOOD, fault=Fault.OUT_OF_MEMORY) if too_large else GOOD

    with opened(database) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=1), records, script)
        micro_batches = [job.plan.micro_batch for job in runner.started]
        needs = [job.plan.estimate.need.median_bytes for job in runner.started]
        assert micro_batches[-1] <= 2
        assert needs == sorted(set(needs), reverse=True)
        assert [job.attempt for job in runner.started] == list(range(1, len(needs) + 1))
        assert states(records) == {TrialState.COMPLETED: 1}


def test_a_trial_that_fits_nowhere_is_infeasible_and_counts(database: Path, tmp_path: Path) -> None:
    script = dataclasses.replace(GOOD, fault=Fault.OUT_OF_MEMORY)
    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=2), records, lambda job: script)
        assert states(records) == {TrialState.INFEASIBLE: 2}


@pytest.mark.parametrize("allow_degrade", [True, False])
def test_what_fits_nowhere_goes_on_shorter_only_with_consent(
    tmp_path: Path, template: Path, allow_degrade: bool
) -> None:
    """At 1024 tokens every way to run is out of memory; consent, and the change is recorded."""

    def script(job: TrialJob) -> Script:
        return GOOD if job.settings.seq_len < 700 else dataclasses.replace(GOOD, fault=Fault.OUT_OF_MEMORY)

    database = tmp_path / "studies.db"
    shutil.copy(template, database)
    with closing(open_records(f"sqlite:///{database}")) as records:
        long = spec("long", num_trials=30, space=space(seq_len=Fixed(value=1024)))
        study = records.open_study(long, now=0.0)
        study.take_over(driver(1), now=0.0)
        _, watcher = tune(study_run(tmp_path, num_trials=1, allow_degrade=allow_degrade), study, script)
        [trial] = study.trials()
        assert trial.state is (TrialState.COMPLETED if allow_degrade else TrialState.INFEASIBLE)
        notes = [one.message for one in watcher.of(Note) if isinstance(one, Note)]
        assert any("length 512 instead of 768" in one for one in notes) is allow_degrade
        again = records.read_study("long").trial(0)  # as the database has it
        assert again.settings.seq_len == (512 if allow_degrade else 1024)
        study.release(now=0.0)


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.HANG], ids=str)
def test_a_lost_or_hung_worker_goes_on_from_its_last_checkpoint(
    database: Path, tmp_path: Path, fault: Fault
) -> None:
    def script(job: TrialJob) -> Script:
        return dataclasses.replace(GOOD, fault=fault, fault_step=6) if job.attempt == 1 else GOOD

    with opened(database) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=1), records, script)
        assert [job.attempt for job in runner.started] == [1, 2]
        assert str(runner.started[1].resume_from).endswith("step-4")
        [trial] = records.trials()
        assert [one.step for one in trial.measurements] == [2, 4, 6, 8]


def test_a_loss_that_is_not_a_number_is_a_result(database: Path, tmp_path: Path) -> None:
    script = dataclasses.replace(GOOD, fault=Fault.NON_FINITE_LOSS)
    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=2), records, lambda job: script if job.trial else GOOD)
        assert states(records) == {TrialState.COMPLETED: 2}
        assert records.trial(1).failure is FailureKind.NON_FINITE_LOSS


def test_bad_data_ends_the_study_with_its_message(database: Path, tmp_path: Path) -> None:
    script = dataclasses.replace(GOOD, fault=Fault.BAD_DATA)
    with opened(database) as records, pytest.raises(UserError, match="bad data"):
        tune(study_run(tmp_path, num_trials=2), records, lambda job: script)


def test_trials_that_keep_breaking_end_the_study(database: Path, tmp_path: Path) -> None:
    script = dataclasses.replace(GOOD, fault=Fault.ERROR)
    with opened(database) as records, pytest.raises(StudyFailedError, match="trial 0 failed"):
        tune(study_run(tmp_path, num_trials=9, num_slots=1), records, lambda job: script)


def test_a_single_broken_trial_is_replaced(database: Path, tmp_path: Path) -> None:
    script = dataclasses.replace(GOOD, fault=Fault.ERROR)
    with opened(database) as records:
        tune(
            study_run(tmp_path, num_trials=3, num_slots=1),
            records,
            lambda job: script if job.trial == 1 else GOOD,
        )
        assert states(records) == {TrialState.COMPLETED: 3, TrialState.FAILED: 1}


def test_another_program_that_holds_the_device_is_waited_for_and_named(
    database: Path, tmp_path: Path
) -> None:
    with opened(database) as records:
        _, watcher = tune(
            study_run(tmp_path, num_trials=1), records, lambda job: GOOD, leases=FakeLeases(num_refusals=3)
        )
        [waiting] = watcher.of(Waiting)
        assert "holds 9.8 GiB until about 14:05" in waiting.message  # type: ignore[attr-defined]
        assert states(records) == {TrialState.COMPLETED: 1}


def test_leaving_stops_what_runs_and_the_next_run_takes_it_up(database: Path, tmp_path: Path) -> None:
    calls = iter(range(1000))
    with opened(database) as records:
        runner, watcher = tune(
            study_run(tmp_path, num_trials=4, num_slots=1),
            records,
            lambda job: GOOD,
            stop_requested=lambda: next(calls) > 4,
        )
        assert runner.stopped[0][2] is StopReason.SHUTDOWN
        assert "Stopping" in watcher.of(Note)[0].message  # type: ignore[attr-defined]
        assert states(records)[TrialState.WAITING] == 1
    with opened(database, now=10.0, number=2) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=4, num_slots=1), records, lambda job: GOOD)
        assert runner.started[0].attempt == 2
        assert states(records) == {TrialState.COMPLETED: 4}


def test_the_time_budget_is_kept(database: Path, tmp_path: Path) -> None:
    with opened(database) as records:
        run = study_run(tmp_path, num_trials=50, num_slots=1, deadline=1_000_000.0 + 36.0)
        runner, watcher = tune(run, records, lambda job: GOOD)
        assert runner.now() <= 1_000_000.0 + 36.0 + GOOD.step_s
        assert 3 <= records.num_finished() <= 6
        assert len(watcher.of(TrialStarted)) == len(runner.started)


# Sharing, gangs, unlike devices


def sharing(number: int, **device: object) -> tuple[Slots, ...]:
    return (Slots(device=gpu(0, **device), num_slots=number, num_threads=1),)  # type: ignore[arg-type]


def quarter_busy(*given: object) -> StepSpeed:
    return dataclasses.replace(speed(*given), device_share=0.25)  # type: ignore[arg-type]


def test_small_trials_share_a_gpu_as_far_as_its_memory_goes(database: Path, tmp_path: Path) -> None:
    """4 GiB and more a trial: three of them fit 21 GiB with a third each, and a fourth never joins."""
    at_once: list[int] = []
    with opened(database) as records:
        run = study_run(tmp_path, num_trials=9, slots=sharing(3, free_bytes=21 * GIB), speed=quarter_busy)

        def script(job: TrialJob) -> Script:
            running = [one for one in records.trials() if one.state is TrialState.RUNNING]
            at_once.append(len(running))
            assert sum(one.plan.estimate.total_bytes for one in running if one.plan) <= 21 * GIB
            return GOOD

        tune(run, records, script)
        assert states(records) == {TrialState.COMPLETED: 9}
        assert max(at_once) == 3


def test_sharing_that_turns_out_too_dear_is_given_up(database: Path, tmp_path: Path) -> None:
    """Alone 100 tokens/s are measured, together a tenth of it, whatever the loads promised."""
    with opened(database) as records:
        alone: list[bool] = []

        def script(job: TrialJob) -> Script:
            num = sum(one.state is TrialState.RUNNING for one in records.trials())
            alone.append(num == 1)
            return dataclasses.replace(GOOD, step_s=1.0 if num == 1 else 10.0)

        def slow(*given: object) -> StepSpeed:
            return StepSpeed(tokens_per_s=100.0, run_s=10.0, device_share=0.45)

        run = study_run(tmp_path, num_trials=12, slots=sharing(2, free_bytes=80 * GIB), speed=slow)
        tune(run, records, script)
        assert not all(alone[:4])
        assert all(alone[-4:])


def test_what_fits_no_single_device_gets_several_at_once(database: Path, tmp_path: Path) -> None:
    def sharded(recipe: StepRecipe, micro_batch: int, seq_len: int, device: DeviceProfile) -> MemoryEstimate:
        whole = memory(recipe, micro_batch, seq_len, device)
        need = whole.need.upper_bytes // recipe.data_parallel
        return dataclasses.replace(whole, need=ByteRange(median_bytes=need, upper_bytes=need))

    slots = tuple(
        Slots(device=gpu(index, free_bytes=4 * GIB), num_slots=1, num_threads=1) for index in range(4)
    )
    with opened(database) as records:
        run = study_run(tmp_path, num_trials=4, slots=slots, estimate=sharded)
        runner, watcher = tune(run, records, lambda job: GOOD)
        assert states(records) == {TrialState.COMPLETED: 4}
        assert {job.plan.data_parallel for job in runner.started[:2]} == {2}
        assert {job.device_uuids for job in runner.started[:2]} == {("GPU-0", "GPU-1"), ("GPU-2", "GPU-3")}
        for job in runner.started:
            plan = job.plan
            batch = plan.micro_batch * plan.gradient_accumulation * plan.data_parallel
            assert batch == job.settings.effective_batch_size
        assert watcher.of(TrialStarted)[0].device_names == ("2 x Some GPU",)  # type: ignore[attr-defined]


def test_the_last_trials_take_the_devices_that_would_stand_idle(database: Path, tmp_path: Path) -> None:
    def scales(
        recipe: StepRecipe, micro_batch: int, what: TrainingSettings, device: DeviceProfile, num_threads: int
    ) -> StepSpeed:
        rate = 1000.0 * recipe.data_parallel
        return StepSpeed(tokens_per_s=rate, run_s=1e4 / rate)

    with opened(database) as records:
        run = study_run(tmp_path, num_trials=5, num_slots=4, speed=scales)
        runner, _ = tune(run, records, lambda job: GOOD)
        assert [job.plan.data_parallel for job in runner.started] == [1, 1, 1, 1, 4]
    with opened(database, now=1e7, number=2) as records:
        run = study_run(tmp_path, num_trials=6, num_slots=4, speed=scales, max_devices_per_trial=2)
        runner, _ = tune(run, records, lambda job: GOOD)
        assert [job.plan.data_parallel for job in runner.started] == [2]


def test_unlike_devices_get_the_plans_that_fit_them(database: Path, tmp_path: Path) -> None:
    sizes = {7: 4e13, 24: 1e14, 80: 3e14}
    slots = tuple(
        Slots(
            device=dataclasses.replace(gpu(gib, free_bytes=gib * GIB, flops=flops), name=f"{gib} GB"),
            num_slots=1,
            num_threads=1,
        )
        for gib, flops in sizes.items()
    )
    with opened(database) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=9, slots=slots), records, lambda job: GOOD)
        plans = {job.plan.device_name: job.plan for job in runner.started}
        assert set(plans) == {"7 GB", "24 GB", "80 GB"}
        for gib in sizes:
            assert plans[f"{gib} GB"].estimate.total_bytes <= gib * GIB
        assert plans["7 GB"].micro_batch < plans["24 GB"].micro_batch


def test_no_more_at_once_than_was_asked_for(database: Path, tmp_path: Path) -> None:
    with opened(database) as records:

        def script(job: TrialJob) -> Script:
            assert sum(one.state is TrialState.RUNNING for one in records.trials()) <= 2
            return GOOD

        tune(study_run(tmp_path, num_trials=6, num_slots=4, max_concurrent=2), records, script)
        assert states(records) == {TrialState.COMPLETED: 6}


@dataclass
class Nodes:
    """Devices that come and go at given times."""

    runner: FakeRunner
    times: Mapping[float, Sequence[int]]  # from then on: these GPUs

    def devices(self) -> ClusterProfile:
        since = max(at for at in self.times if at <= self.runner.now() - 1_000_000.0)
        devices = tuple(gpu(index, free_bytes=80 * GIB) for index in self.times[since])
        return ClusterProfile(devices=devices, driver_version=None, cuda_version=None)


def test_devices_that_join_are_used_and_those_that_left_are_waited_for(
    database: Path, tmp_path: Path
) -> None:
    with opened(database) as records:
        runner, watcher = FakeRunner(lambda job: GOOD), Watcher()
        nodes = Nodes(runner, {0.0: [0], 5.0: [0, 1], 25.0: [], 60.0: [2]})
        run = study_run(
            tmp_path,
            num_trials=12,
            num_slots=1,
            share=lambda device: Slots(device=device, num_slots=1, num_threads=1),
        )
        run_study(
            run,
            records=records,
            runner=runner,
            leases=FakeLeases(),
            observe=watcher,
            stop_requested=lambda: False,
            devices=nodes,
        )
        assert states(records) == {TrialState.COMPLETED: 12}
        assert {job.device_uuids for job in runner.started} == {("GPU-0",), ("GPU-1",), ("GPU-2",)}
        notes = [one.message for one in watcher.of(Note)]  # type: ignore[attr-defined]
        assert any("GPU-1) of here has joined" in one for one in notes)
        assert any("GPU-0) of here has left" in one for one in notes)
        assert any("no device" in one.message for one in watcher.of(Waiting))  # type: ignore[attr-defined]


# Rungs and wishes


def test_at_a_rung_trials_pause_and_the_best_of_them_are_promoted(database: Path, tmp_path: Path) -> None:
    """Trial 4 is the best of eight and comes late; half of each rung goes on."""

    def script(job: TrialJob) -> Script:
        offset = {4: 0.0}.get(job.trial, 1.0 + job.trial / 10)
        return Script(num_steps=8, eval_losses=tuple(one + offset for one in LOSSES))

    with opened(database) as records:
        rule = PruningRule(pauses=True)
        runner, _ = tune(study_run(tmp_path, num_trials=8, rule=rule), records, script)
        assert [one for one in runner.stopped if one[2] is StopReason.RUNG]
        reached = [max(one.evaluation or 0 for one in trial.measurements) for trial in records.trials()]
        assert states(records) == {TrialState.COMPLETED: 2, TrialState.STOPPED: 6}
        assert reached[0] == reached[4] == 4  # the default, which is protected, and the best
        assert sum(one >= 2 for one in reached) == 4
        assert sum(one >= 3 for one in reached) <= 3
        resumed = [job for job in runner.started if job.attempt > 1]
        assert resumed
        assert all(job.resume_from is not None for job in resumed)
        stopped = [one for one in records.trials() if one.state is TrialState.STOPPED]
        assert all(one.value is not None and "others were better" in one.message for one in stopped)


def ask(database: Path, kind: CommandKind, trial: int | None = None, **parameters: float) -> None:
    with closing(open_records(f"sqlite:///{database}")) as records:
        records.send_command("study", kind, trial=trial, parameters=parameters, now=0.0)


def test_a_user_pauses_a_trial_and_takes_it_up_again(database: Path, tmp_path: Path) -> None:
    def script(job: TrialJob) -> Script:
        if job.trial == 1 and job.attempt == 1:
            ask(database, CommandKind.PAUSE, 1)
        return GOOD

    with opened(database) as records:
        runner, watcher = tune(study_run(tmp_path, num_trials=3, num_slots=1), records, script)
        assert states(records) == {TrialState.COMPLETED: 2, TrialState.PAUSED: 1}
        assert runner.stopped == [(1, 1, StopReason.PAUSED)]
        assert "autosft studies resume study --trial 1" in watcher.of(Note)[-1].message  # type: ignore[attr-defined]
    ask(database, CommandKind.RESUME, 1)
    with opened(database, now=1e7, number=2) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=3, num_slots=1), records, script)
        assert [(job.trial, job.attempt) for job in runner.started] == [(1, 2)]
        assert states(records) == {TrialState.COMPLETED: 3}
        assert not records.pending_commands()


def test_a_user_stops_and_enqueues(database: Path, tmp_path: Path) -> None:
    def script(job: TrialJob) -> Script:
        if job.trial == 1:
            ask(database, CommandKind.STOP, 1)
            ask(database, CommandKind.ENQUEUE, weight_decay=0.07)
            ask(database, CommandKind.ENQUEUE, weight_decay=99.0)
        return GOOD

    with opened(database) as records:
        _, watcher = tune(study_run(tmp_path, num_trials=4, num_slots=1), records, script)
        assert states(records) == {TrialState.COMPLETED: 3, TrialState.STOPPED: 1}
        assert records.trial(2).origin == "enqueued"
        assert dict(records.trial(2).parameters)["weight_decay"] == 0.07
        notes = [one.message for one in watcher.of(Note)]  # type: ignore[attr-defined]
        assert any(one.startswith("Not enqueued: weight_decay: 99.0 is outside") for one in notes)


def test_a_user_pauses_and_resumes_the_whole_study(database: Path, tmp_path: Path) -> None:
    with opened(database) as records:
        runner, watcher = FakeRunner(lambda job: GOOD), Watcher()

        def tell(event: StudyEvent) -> None:
            watcher(event)
            if isinstance(event, TrialStarted) and event.record.number == 1 and event.attempt == 1:
                ask(database, CommandKind.PAUSE)
            if isinstance(event, Waiting) and "Paused" in event.message:
                runner.pass_time(1000.0)
                ask(database, CommandKind.RESUME)

        run_study(
            study_run(tmp_path, num_trials=3, num_slots=1),
            records=records,
            runner=runner,
            leases=FakeLeases(),
            observe=tell,
            stop_requested=lambda: False,
        )
        assert states(records) == {TrialState.COMPLETED: 3}
        assert runner.started[2].trial == 1
        assert runner.started[2].attempt == 2


def test_a_user_stops_the_whole_study_from_elsewhere(database: Path, tmp_path: Path) -> None:
    def script(job: TrialJob) -> Script:
        ask(database, CommandKind.STOP)
        return GOOD

    with opened(database) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=3), records, script)
        assert {one[2] for one in runner.stopped} == {StopReason.SHUTDOWN}
        assert states(records)[TrialState.WAITING] == len(runner.started)


# Growing


def test_idle_time_between_trials_is_measured(database: Path, tmp_path: Path) -> None:
    """Each trial takes 2.5 s to load before its first step."""
    runners: list[FakeRunner] = []

    def script(job: TrialJob) -> Script:
        runners[0].pass_time(2.5)
        return GOOD

    with opened(database) as records:
        runners.append(FakeRunner(script))
        tally = run_study(
            study_run(tmp_path, num_trials=4, num_slots=1),
            records=records,
            runner=runners[0],
            leases=FakeLeases(),
            observe=Watcher(),
            stop_requested=lambda: False,
        )
        assert tally.num_gaps == 3
        assert tally.median_gap_s == pytest.approx(2.5)
        assert tally.idle_s == pytest.approx(7.5)


FAULTS: Mapping[str, Fault | None] = {
    "none": None,
    "lost": Fault.LOST,
    "oom": Fault.OUT_OF_MEMORY,
    "nan": Fault.NON_FINITE_LOSS,
}


@hypothesis_settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    faults=st.lists(st.tuples(st.sampled_from(sorted(FAULTS)), st.integers(1, 8)), min_size=1, max_size=12),
    num_slots=st.integers(1, 3),
)
def test_under_any_faults_the_number_of_finished_trials_is_exact(
    faults: list[tuple[str, int]], num_slots: int, tmp_path: Path, template: Path
) -> None:
    """Attempt i of the study meets faults[i]; later ones run well."""
    assume([name for name, _ in faults].count("lost") < MAX_LOST_ATTEMPTS)  # so many may fail a trial
    database = tmp_path / "studies.db"
    shutil.copy(template, database)
    plan = iter(faults)

    def script(job: TrialJob) -> Script:
        name, step = next(plan, ("none", 1))
        return dataclasses.replace(GOOD, fault=FAULTS[name], fault_step=step)

    with opened(database) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=4, num_slots=num_slots), records, script)
        assert records.num_finished() == 4
        assert not records.unfinished()
        assert sum(one.num_attempts for one in records.trials()) == len(runner.started)
        for trial in records.trials():
            evaluations = [one.evaluation for one in trial.measurements]
            assert evaluations == sorted(set(evaluations))  # type: ignore[type-var]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "studies.db"
    open_records(f"sqlite:///{path}").close()
    return path
