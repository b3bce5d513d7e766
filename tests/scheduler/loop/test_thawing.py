"""A freeze-thaw search in the loop: trials are paused, gone on with where it is worth most, and ended."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.events import TrialForecast
from autosft.scheduler.loop import launch
from autosft.scheduler.loop.state import Loop
from autosft.studies.search.freeze_thaw.proposal import NUM_STARTUP
from autosft.studies.search.space import default_parameters
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import StopReason, TrialJob, TrialRecord, TrialState
from tests.scheduler.study_loop import opened, states, study_run, tune
from tests.studies.study_examples import space
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Fault, Script

pytestmark = pytest.mark.usefixtures("quick_records")

RULE = PruningRule(thaws=True)
BEST_RATE = 4e-4
NUM_TRIALS = 10


def losses(job: TrialJob) -> tuple[float, ...]:
    """A bowl over the learning rate, deeper towards the end of a run."""
    off = math.log10(job.settings.learning_rate / BEST_RATE)
    return tuple(math.exp(0.3 * off**2) * (1 + 0.3 * (4 / step - 1)) for step in (1, 2, 3, 4))


def script(job: TrialJob) -> Script:
    return Script(num_steps=8, eval_losses=losses(job))


def begin(records: StudyRecords) -> None:
    records.enqueue(default_parameters(space()), origin="default", now=0.0)


def reached(trial: TrialRecord) -> int:
    return max((step.evaluation or 0 for step in trial.measurements), default=0)


def searched(database: Path, folder: Path, **changes: object) -> tuple[tuple[TrialRecord, ...], FakeRunner]:
    with opened(database) as records:
        begin(records)
        run = study_run(folder, num_trials=NUM_TRIALS, rule=RULE, **changes)
        runner, _ = tune(run, records, script)
        return records.trials(), runner


def test_the_default_and_the_best_run_in_full_and_the_others_are_paused(
    database: Path, tmp_path: Path
) -> None:
    trials, runner = searched(database, tmp_path)
    assert len(trials) == NUM_TRIALS, "every one of --trials is tried"
    assert trials[0].is_default
    assert reached(trials[0]) == 4
    assert all(trial.state in (TrialState.COMPLETED, TrialState.STOPPED) for trial in trials)
    best = min(trials, key=lambda trial: trial.value or math.inf)
    assert best.state is TrialState.COMPLETED
    assert abs(math.log10(best.settings.learning_rate / BEST_RATE)) < 0.3
    assert {reason for *_, reason in runner.stopped} == {StopReason.RUNG}
    spent = sum(map(reached, trials)) / 4
    assert spent < 0.7 * NUM_TRIALS
    gone_on = [job for job in runner.started if job.attempt > 1]
    assert all(job.resume_from is not None for job in gone_on), "from its checkpoint"
    ended = [trial for trial in trials if trial.state is TrialState.STOPPED]
    assert all(trial.value is not None and "worth less" in trial.message for trial in ended)


@pytest.mark.parametrize("num_slots", [1, 3])
def test_the_same_study_decides_the_same(tmp_path: Path, num_slots: int) -> None:
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        trials, runner = searched(folder / "studies.db", folder, num_slots=num_slots)
        started = [(job.trial, job.attempt) for job in runner.started]
        found.append(([trial.parameters for trial in trials], started))
    assert found[0] == found[1]


def test_a_study_that_was_killed_goes_on_as_if_it_had_not_been(database: Path, tmp_path: Path) -> None:
    """After every few events the driver leaves; with one slot, what is decided is the same."""
    alone = tmp_path / "alone"
    alone.mkdir()
    expected, _ = searched(alone / "studies.db", alone, num_slots=1)
    with opened(database) as records:
        begin(records)
    for number in range(2, 40):
        with opened(database, number=number) as records:
            seen: list[int] = []

            def leaves(seen: list[int] = seen) -> bool:
                seen.append(1)
                return len(seen) > 30

            run = study_run(tmp_path, num_trials=NUM_TRIALS, rule=RULE, num_slots=1)
            tune(run, records, script, stop_requested=leaves)
            trials = records.trials()
            if len(trials) == NUM_TRIALS and all(trial.state.is_over for trial in trials):
                break
    assert [trial.parameters for trial in trials] == [trial.parameters for trial in expected]
    assert [reached(trial) for trial in trials] == [reached(trial) for trial in expected]


def test_a_trial_that_diverges_ends_and_the_search_goes_on(database: Path, tmp_path: Path) -> None:
    def diverges_at_high_rates(job: TrialJob) -> Script:
        fault = Fault.NON_FINITE_LOSS if job.settings.learning_rate > 8e-4 else None
        return Script(num_steps=8, eval_losses=losses(job), fault=fault, fault_step=1)

    with opened(database) as records:
        begin(records)
        tune(study_run(tmp_path, num_trials=NUM_TRIALS, rule=RULE), records, diverges_at_high_rates)
        assert sum(states(records).values()) == NUM_TRIALS
        best = min(records.trials(), key=lambda trial: trial.value or math.inf)
        assert best.settings.learning_rate <= 8e-4
        assert best.state is TrialState.COMPLETED


def test_people_are_told_why_a_trial_is_paused_or_gone_on_with(database: Path, tmp_path: Path) -> None:
    with opened(database) as records:
        begin(records)
        _, watcher = tune(study_run(tmp_path, num_trials=NUM_TRIALS, rule=RULE), records, script)
        paused = {trial.number for trial in records.trials() if trial.state is TrialState.STOPPED}
    told = [event for event in watcher.of(TrialForecast) if isinstance(event, TrialForecast)]
    assert paused - set(range(NUM_STARTUP)) <= {event.trial for event in told if not event.goes_on}
    assert any(event.goes_on for event in told)
    assert all(event.low < event.end < event.high and event.reason for event in told)
    assert all("promise" in event.reason or "noise" in event.reason for event in told)
    best = [event for event in told if event.goes_on and event.reason == "it promises most per token"]
    assert best, "some are the best there is"


def test_a_full_disk_ends_the_paused_trial_that_promises_least(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for the checkpoints of three paused trials, the study goes on instead of waiting forever."""

    def shortage(loop: Loop) -> str | None:
        paused = [trial for trial in loop.records.unfinished() if trial.state is TrialState.PAUSED]
        return "no room" if len(paused) > 3 else None

    monkeypatch.setattr(launch, "disk_shortage", shortage)
    with opened(database) as records:
        begin(records)
        tune(study_run(tmp_path, num_trials=NUM_TRIALS, rule=RULE), records, script)
        trials = records.trials()
    assert len(trials) == NUM_TRIALS
    ended = [trial for trial in trials if "no room" in trial.message]
    assert ended
    best = min(trials, key=lambda trial: trial.value or math.inf)
    assert best.state is TrialState.COMPLETED
    assert all(trial.value is not None and trial.value > 1.05 * (best.value or 0) for trial in ended)


@pytest.mark.parametrize("rule", [RULE, PruningRule()], ids=["freeze-thaw", "stop"])
@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_budget_in_full_runs_ends_a_study(
    database: Path, tmp_path: Path, rule: PruningRule, num_slots: int
) -> None:
    """The last trials end after it at most by what they had begun: an evaluation, or their runs."""
    with opened(database) as records:
        begin(records)
        run = study_run(tmp_path, num_trials=NUM_TRIALS, rule=rule, num_slots=num_slots, budget_runs=3.0)
        tune(run, records, script)
        trials = records.trials()
    spent = sum(map(reached, trials)) / 4
    assert 3 <= spent <= 3 + num_slots * (0.25 if rule.thaws else 1)
    assert all(trial.state.is_over for trial in trials)
    assert len(trials) < NUM_TRIALS


def test_a_study_of_a_trial_or_two_needs_no_model(database: Path, tmp_path: Path) -> None:
    with opened(database) as records:
        begin(records)
        for num_trials in (1, 2, 3):
            tune(study_run(tmp_path, num_trials=num_trials, rule=RULE), records, script)
            assert sum(states(records).values()) == num_trials
            assert all(trial.state.is_finished for trial in records.trials())
