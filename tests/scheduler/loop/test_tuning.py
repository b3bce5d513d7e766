"""The whole loop on a virtual clock: real records in SQLite, a fake runner, fake leases."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from autosft.profiles.errors import StudyFailedError, UserError
from autosft.profiles.hardware.device import DeviceKind
from autosft.scheduler.decide.no_result import why_no_result
from autosft.scheduler.events import Note, TrialStarted, Waiting
from autosft.scheduler.loop.transitions import MAX_LOST_ATTEMPTS
from autosft.scheduler.loop.tuning import run_study
from autosft.scheduler.setup.learned import learned_so_far
from autosft.scheduler.study_run import Slots
from autosft.studies.search.dimensions import Fixed
from autosft.studies.store.records import open_records
from autosft.studies.trial import DEFAULT_ORIGIN, FailureKind, StopReason, TrialJob, TrialState
from tests.scheduler.devices import GIB, gpu
from tests.scheduler.study_loop import GOOD, LOSSES, FakeLeases, Watcher, opened, states, study_run, tune
from tests.studies.study_examples import driver, space, spec
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import FAILURES, Fault, Script

pytestmark = pytest.mark.usefixtures("quick_records")


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


@pytest.mark.parametrize(
    "place", [0, 3], ids=["the default comes first", "strategies of a preset come first"]
)
def test_hopeless_trials_are_stopped_and_the_default_is_not(
    database: Path, tmp_path: Path, place: int
) -> None:
    """The default configuration runs in full because it is the default, wherever it stands in the queue."""

    def script(job: TrialJob) -> Script:
        hopeless = job.trial in (place, 4)
        return Script(num_steps=8, eval_losses=(9.0, 9.0, 9.0, 9.0) if hopeless else LOSSES)

    with opened(database) as records:
        for number in range(place):
            records.enqueue({"learning_rate": 2e-5 * (number + 1)}, origin="laptop-8gb A", now=0.0)
        records.enqueue({}, origin=DEFAULT_ORIGIN, now=0.0)
        tune(study_run(tmp_path, num_trials=5, num_slots=1), records, script)
        assert [trial.number for trial in records.trials() if trial.is_default] == [place]
        assert [trial.state for trial in records.trials()] == [TrialState.COMPLETED] * 4 + [
            TrialState.STOPPED
        ]
        assert records.trial(4).measurements[-1].evaluation == 1


def test_no_trial_but_the_default_is_protected(database: Path, tmp_path: Path) -> None:
    def script(job: TrialJob) -> Script:
        is_first = job.trial == 0  # slow as well, so that others have been there before it
        return Script(
            num_steps=8, step_s=9.0 if is_first else 1.0, eval_losses=(9.0,) * 4 if is_first else LOSSES
        )

    with opened(database) as records:
        records.enqueue({"learning_rate": 2e-5}, origin="laptop-8gb A", now=0.0)
        records.enqueue({}, origin=DEFAULT_ORIGIN, now=0.0)
        tune(study_run(tmp_path, num_trials=4, num_slots=4), records, script)
        assert records.trial(0).state is TrialState.STOPPED


def test_how_fast_a_trial_was_is_kept_for_later_plans(database: Path, tmp_path: Path) -> None:
    # 500 tokens a second; the second prediction is corrected by the first trial
    long = Script(num_steps=40, step_s=0.2, eval_losses=LOSSES)
    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=2, num_slots=1), records, lambda job: long)
    kept = learned_so_far(f"sqlite:///{database}").speed.rows
    cold = [item.ratio for item in kept]
    assert len(cold) == 2
    assert cold[0] == pytest.approx(cold[1])
    assert kept[0].kind.device_name == "Some GPU"
    short = Script(num_steps=8, eval_losses=LOSSES)
    with opened(database, now=100.0, number=2) as records:
        tune(study_run(tmp_path, num_trials=3, num_slots=1), records, lambda job: short)
    assert len(learned_so_far(f"sqlite:///{database}").speed.rows) == 2, "a short one teaches nothing"


@pytest.mark.parametrize(("slowdown", "num"), [(None, 1), (1.1, 1), (4.0, 0)])
def test_a_busy_machine_teaches_no_speed(
    slowdown: float | None, num: int, database: Path, tmp_path: Path
) -> None:
    """A method that ran while others used the machine would look slower than one that did not."""
    held_up = Script(num_steps=40, step_s=0.2, eval_losses=LOSSES, slowdown=slowdown)
    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=1, num_slots=1), records, lambda job: held_up)
    assert len(learned_so_far(f"sqlite:///{database}").speed.rows) == num


def test_out_of_memory_is_replanned_smaller_and_learned(database: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("kind", "is_smaller"), [(DeviceKind.CPU, True), (DeviceKind.CUDA, False)])
def test_a_trial_that_the_kernel_killed_although_alone_is_replanned_smaller(
    kind: DeviceKind, is_smaller: bool, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In RAM, where it trains; what a GPU's trial takes of RAM does not depend on its rows."""
    monkeypatch.setitem(FAILURES, Fault.LOST, FailureKind.HOST_OUT_OF_MEMORY)

    def script(job: TrialJob) -> Script:
        return dataclasses.replace(GOOD, fault=Fault.LOST) if job.attempt == 1 else GOOD

    device = dataclasses.replace(gpu(free_bytes=80 * GIB), kind=kind, total_bytes=80 * GIB, context_bytes=0)
    slots = (Slots(device=device, num_slots=1, num_threads=1),)
    with opened(database) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=1, slots=slots), records, script)
        assert states(records) == {TrialState.COMPLETED: 1}
    first, second = (job.plan.micro_batch for job in runner.started)
    assert (second < first) == is_smaller


def test_a_trial_that_fits_nowhere_is_infeasible_and_counts(database: Path, tmp_path: Path) -> None:
    script = dataclasses.replace(GOOD, fault=Fault.OUT_OF_MEMORY)
    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=2), records, lambda job: script)
        assert states(records) == {TrialState.INFEASIBLE: 2}
        why = why_no_result(records.trials(), is_time_over=False)
        assert re.search(r"trial 0, the first of 2 to fail: out of device memory.*--seq-len", why)


@pytest.mark.parametrize("allow_degrade", [True, False])
def test_what_fits_nowhere_continues_shorter_only_with_consent(
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
        run = study_run(tmp_path, num_trials=1, allow_degrade=allow_degrade)
        if not allow_degrade:
            tune(run, study, script)
            assert "at length 1024, ran out of memory" in why_no_result(study.trials(), is_time_over=False)
            assert [trial.state for trial in study.trials()] == [TrialState.INFEASIBLE]
            assert records.read_study("long").trial(0).settings.seq_len == 1024
            study.release(now=0.0)
            return
        _, watcher = tune(run, study, script)
        [trial] = study.trials()
        assert trial.state is TrialState.COMPLETED
        notes = [item.message for item in watcher.of(Note) if isinstance(item, Note)]
        assert any("length 512 instead of 768" in note for note in notes)
        assert records.read_study("long").trial(0).settings.seq_len == 512, "as the database has it"
        study.release(now=0.0)


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.HANG], ids=str)
def test_a_lost_or_hung_worker_resumes_from_its_last_checkpoint(
    database: Path, tmp_path: Path, fault: Fault
) -> None:
    def script(job: TrialJob) -> Script:
        return dataclasses.replace(GOOD, fault=fault, fault_step=6) if job.attempt == 1 else GOOD

    with opened(database) as records:
        runner, _ = tune(study_run(tmp_path, num_trials=1), records, script)
        assert [job.attempt for job in runner.started] == [1, 2]
        assert str(runner.started[1].resume_from).endswith("step-4")
        [trial] = records.trials()
        assert [measurement.step for measurement in trial.measurements] == [2, 4, 6, 8]


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


def test_what_cannot_start_ends_the_study_after_one_try_and_waits(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The surroundings are at fault: once they are mended, the same trial runs."""
    monkeypatch.setitem(FAILURES, Fault.CRASH, FailureKind.NOT_STARTED)
    script = dataclasses.replace(GOOD, fault=Fault.CRASH, fault_step=1)
    with opened(database) as records:
        with pytest.raises(StudyFailedError, match=r"trial 0 could not start, and none would: \w+"):
            tune(study_run(tmp_path, num_trials=3, num_slots=1), records, lambda job: script)
        [trial] = records.trials()
        assert (trial.state, trial.num_attempts) == (TrialState.WAITING, 1)
    with opened(database, now=10.0, number=2) as records:
        tune(study_run(tmp_path, num_trials=3, num_slots=1), records, lambda job: GOOD)
        assert states(records) == {TrialState.COMPLETED: 3}


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


def test_leaving_stops_what_runs_and_the_next_run_resumes_it(database: Path, tmp_path: Path) -> None:
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


@pytest.mark.slow
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
        assert sum(trial.num_attempts for trial in records.trials()) == len(runner.started)
        for trial in records.trials():
            evaluations = [measurement.evaluation for measurement in trial.measurements]
            assert evaluations == sorted(set(evaluations))  # type: ignore[type-var]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "studies.db"
    open_records(f"sqlite:///{path}").close()
    return path
