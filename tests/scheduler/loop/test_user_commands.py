"""The loop at rungs, and what users ask of it while it runs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.events import Note, StudyEvent, TrialStarted, Waiting
from autosft.scheduler.loop.tuning import run_study
from autosft.studies.search.space import default_parameters
from autosft.studies.store.records import CommandKind, open_records
from autosft.studies.trial import StopReason, TrialJob, TrialState
from tests.scheduler.study_loop import GOOD, LOSSES, FakeLeases, Watcher, opened, states, study_run, tune
from tests.studies.study_examples import space
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Script

pytestmark = pytest.mark.usefixtures("quick_records")


def test_at_a_rung_trials_pause_and_the_best_of_them_are_promoted(database: Path, tmp_path: Path) -> None:
    """Trial 4 is the best of eight and comes late; half of each rung goes on."""

    def script(job: TrialJob) -> Script:
        offset = {4: 0.0}.get(job.trial, 1.0 + job.trial / 10)
        return Script(num_steps=8, eval_losses=tuple(loss + offset for loss in LOSSES))

    with opened(database) as records:
        records.enqueue(default_parameters(space()), origin="default", now=0.0)
        rule = PruningRule(pauses=True)
        runner, _ = tune(study_run(tmp_path, num_trials=8, rule=rule), records, script)
        assert [item for item in runner.stopped if item[2] is StopReason.RUNG]
        reached = [
            max(measurement.evaluation or 0 for measurement in trial.measurements)
            for trial in records.trials()
        ]
        assert states(records) == {TrialState.COMPLETED: 2, TrialState.STOPPED: 6}
        assert reached[0] == reached[4] == 4  # the default, which is protected, and the best
        assert sum(item >= 2 for item in reached) == 4
        assert sum(item >= 3 for item in reached) <= 3
        resumed = [job for job in runner.started if job.attempt > 1]
        assert resumed
        assert all(job.resume_from is not None for job in resumed)
        stopped = [trial for trial in records.trials() if trial.state is TrialState.STOPPED]
        assert all(item.value is not None and "others were better" in item.message for item in stopped)


def ask(database: Path, kind: CommandKind, trial: int | None = None, **parameters: float) -> None:
    with closing(open_records(f"sqlite:///{database}")) as records:
        records.send_command("study", kind, trial=trial, parameters=parameters, now=0.0)


def test_a_user_pauses_a_trial_and_resumes_it(database: Path, tmp_path: Path) -> None:
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
        notes = [item.message for item in watcher.of(Note)]  # type: ignore[attr-defined]
        assert any(note.startswith("Not enqueued: weight_decay: 99.0 is outside") for note in notes)


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
        assert {item[2] for item in runner.stopped} == {StopReason.SHUTDOWN}
        assert states(records)[TrialState.WAITING] == len(runner.started)
