"""What fails around the trials: waited for, never the trial's fault, taken up again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from autosft.profiles.errors import StudyFailedError
from autosft.scheduler.events import Note, Waiting
from autosft.scheduler.loop.backing_off import WAITS_S
from autosft.scheduler.loop.state import Pause
from autosft.scheduler.loop.transitions import may_be_tried_again
from autosft.studies.trial import DEFAULT_ORIGIN, FailureKind, TrialJob, TrialState
from tests.scheduler.devices import GIB
from tests.scheduler.loop.test_transitions import TRIAL
from tests.scheduler.study_loop import GOOD, FakeLeases, opened, states, study_run, tune
from tests.workers.scripted import Fault, Script, end, make_job

pytestmark = pytest.mark.usefixtures("quick_records")

BROKEN = dataclasses.replace(GOOD, fault=Fault.SURROUNDINGS, fault_step=1)


def broken_until(attempt: int) -> Callable[[TrialJob], Script]:
    """Return scripts of attempts whose surroundings are in order from an attempt on."""
    return lambda job: GOOD if job.attempt >= attempt else BROKEN


@pytest.mark.parametrize("mended_at", [2, 3, 4])
def test_the_surroundings_are_waited_for_and_the_trial_goes_on(
    database: Path, tmp_path: Path, mended_at: int
) -> None:
    with opened(database) as records:
        runner, watcher = tune(
            study_run(tmp_path, num_trials=2, num_slots=1), records, broken_until(mended_at)
        )
        assert states(records) == {TrialState.COMPLETED: 2}
        assert "surroundings" in watcher.of(Waiting)[0].message  # type: ignore[attr-defined]
        assert runner.now() - 1_000_000.0 > sum(WAITS_S[: mended_at - 1])


@pytest.mark.parametrize(
    ("now", "is_pause"), [(9.9, False), (10.0, True), (14.9, True), (15.0, False), (-7200.0, False)]
)
def test_a_pause_ends_where_the_clock_is_set_back(now: float, is_pause: bool) -> None:
    assert Pause(10.0, 15.0).has(now) == is_pause
    assert not Pause().has(now)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_study_ends_with_the_cause_and_its_trials_wait_for_the_next_run(
    database: Path, tmp_path: Path, num_slots: int
) -> None:
    run = study_run(tmp_path, num_trials=3, num_slots=num_slots)
    with opened(database) as records:
        records.enqueue({}, origin=DEFAULT_ORIGIN, now=0.0)
        with pytest.raises(StudyFailedError, match=r"scripted: surroundings.*4 times in .*waits") as raised:
            tune(run, records, lambda job: BROKEN)
        assert "same command again" in str(raised.value)
        assert TrialState.FAILED not in states(records)
        assert len(records.attempts()) <= 4 * num_slots, "not one after the other within seconds"
    with opened(database, now=10.0, number=2) as records:
        tune(run, records, lambda job: GOOD)
        assert states(records) == {TrialState.COMPLETED: 3}
        assert records.trial(0).is_default


def test_an_evaluation_in_between_starts_the_count_anew(database: Path, tmp_path: Path) -> None:
    """A disk that comes and goes for a day does not end a study that gets on."""

    def script(job: TrialJob) -> Script:  # each attempt comes two steps, one evaluation, further
        return dataclasses.replace(
            GOOD,
            num_steps=16,
            eval_losses=(2.0,) * 8,
            fault=Fault.SURROUNDINGS,
            fault_step=2 * job.attempt + 1,
        )

    with opened(database) as records:
        tune(study_run(tmp_path, num_trials=1, num_slots=1), records, script)
        assert states(records) == {TrialState.COMPLETED: 1}
        assert len(records.attempts()) == 8


OF_EARLIER_VERSIONS = {
    "workers lost": (FailureKind.WORKER_LOST, "killed by SIGKILL", True),
    "storage": (FailureKind.STORAGE, "s3://x is away", True),
    "a disk": (FailureKind.ERROR, "OSError: [Errno 30] Read-only file system: '/x'", True),
    "a file": (FailureKind.ERROR, "FileNotFoundError: [Errno 2] No such file or directory: '/x'", True),
    "a bug": (FailureKind.ERROR, "KeyError: 'loss'", False),
    "words of a bug": (FailureKind.ERROR, "ValueError: see [Errno 2] in the log", False),
    "data": (FailureKind.BAD_DATA, "line 3", False),
}


@pytest.mark.parametrize("name", OF_EARLIER_VERSIONS)
def test_what_earlier_versions_have_failed_is_told_from_the_trials_own_fault(name: str) -> None:
    failure, message, expect = OF_EARLIER_VERSIONS[name]
    failed = dataclasses.replace(TRIAL, state=TrialState.FAILED, failure=failure, message=message)
    assert may_be_tried_again(failed) is expect
    assert not may_be_tried_again(dataclasses.replace(failed, state=TrialState.STOPPED))


def test_a_trial_that_had_failed_is_taken_up_again(database: Path, tmp_path: Path) -> None:
    with opened(database) as records:
        for origin in ("sampler", DEFAULT_ORIGIN):
            records.enqueue({"learning_rate": 2e-5 if origin == "sampler" else 1e-4}, origin=origin, now=0.0)
            trial = records.ask(now=0.0)
            job_plan = TRIAL.plan
            assert job_plan is not None
            records.begin_attempt(trial.number, plan=job_plan, device_uuids=("GPU-0",), now=0.0)
            lost = dataclasses.replace(
                end(make_job(), failure=FailureKind.WORKER_LOST), trial=trial.number, attempt=1
            )
            records.end_attempt(lost, TrialState.FAILED, now=1.0)
    with opened(database, now=10.0, number=2) as records:
        _, watcher = tune(study_run(tmp_path, num_trials=1, num_slots=1), records, lambda job: GOOD)
        assert records.trial(0).state is TrialState.FAILED, (
            "one trial was asked for, and the default is first"
        )
        assert records.trial(1).state is TrialState.COMPLETED
        assert any("Trial 1 is tried again" in note.message for note in watcher.of(Note))  # type: ignore[attr-defined]


def test_a_trial_whose_worker_is_lost_again_and_again_is_not_tried_within_seconds(
    database: Path, tmp_path: Path
) -> None:
    lost = dataclasses.replace(GOOD, fault=Fault.LOST, fault_step=1, step_s=0.1)
    with opened(database) as records:
        with pytest.raises(StudyFailedError):
            tune(study_run(tmp_path, num_trials=1, num_slots=1), records, lambda job: lost)
        starts = [attempt.started_at for attempt in records.attempts()]
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        assert gaps == sorted(gaps)
        assert gaps[-1] > 5.0


@pytest.mark.parametrize(("most_gib", "micro_batch"), [(6, 1), (5, None)])
def test_a_container_that_our_own_processes_fill_is_planned_anew_instead_of_waited_for(
    database: Path, tmp_path: Path, most_gib: int, micro_batch: int | None
) -> None:
    """Nobody else can free what autosft itself takes: smaller plans, or an end that says so."""
    leases = FakeLeases(most=most_gib * GIB)
    with opened(database) as records:
        run = study_run(tmp_path, num_trials=1, num_slots=1)
        if micro_batch is None:
            tune(run, records, lambda job: GOOD, leases=leases)
            assert records.trial(0).state is TrialState.INFEASIBLE
            return
        runner, watcher = tune(run, records, lambda job: GOOD, leases=leases)
        assert runner.started[0].plan.booked_bytes <= most_gib * GIB
        [note] = [note.message for note in watcher.of(Note) if "autosft itself takes" in note.message]  # type: ignore[attr-defined]
        assert "24.0 GiB" in note
        assert watcher.of(Waiting) == []
