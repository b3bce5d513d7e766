"""The untuned model is scored exactly once per study, whatever happens meanwhile."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from autosft.scheduler.events import NewBest, Note, TrialMeasured, UntunedScored, Waiting
from autosft.scheduler.finish.untuned_score import AgainstUntuned, score_untuned
from autosft.studies.files.checkpoints import evaluation_path, trial_dir, untuned_dir
from autosft.studies.trial import StopReason, Task
from tests.scheduler.study_loop import FakeLeases, Watcher, opened, study_run
from tests.studies.study_examples import PLAN, evaluation
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Fault, Script, make_job

ONE = Script(num_steps=2, eval_losses=(2.5,))


def open_study(tmp_path: Path, records: Any, script: Script = ONE, *, refusals: int = 0) -> Any:
    run = study_run(tmp_path, num_trials=3)
    plan = dataclasses.replace(PLAN, device_name=run.slots[0].device.name)
    return SimpleNamespace(
        run=run,
        model=SimpleNamespace(num_parameters=1000),
        records=records,
        runner=FakeRunner(lambda _: script),
        leases=FakeLeases(num_refusals=refusals),
        default=SimpleNamespace(plan=plan, settings=make_job().settings),
    )


def score(study: Any, stop_requested: Any = lambda: False) -> Watcher:
    watcher = Watcher()
    score_untuned(study, observe=watcher, stop_requested=stop_requested)
    return watcher


def test_it_is_scored_once_and_kept_over_runs(tmp_path: Path) -> None:
    with opened(tmp_path / "studies.db") as records:
        study = open_study(tmp_path, records)
        watcher = score(study)
        [job] = study.runner.started
        assert (job.task, job.resume_from, job.trial) == (Task.UNTUNED, None, -1)
        assert job.pinned == study.run.pinned, "as trials are evaluated"
        assert watcher.of(UntunedScored) == [UntunedScored(metric="eval_loss", value=2.5)]
        assert records.num_finished() == 0
    with opened(tmp_path / "studies.db", number=2) as records:
        study = open_study(tmp_path, records)
        assert score(study).events == []
        assert study.runner.started == []
        kept = records.untuned()
        assert kept is not None
        assert kept.metric("eval_loss") == 2.5
        assert not records.keep_untuned(dataclasses.replace(kept, metrics=(("eval_loss", 9.0),)))
        assert records.untuned() == kept


def test_what_a_kill_leaves_is_scored_by_the_next_run(tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    for number in (1, 2):
        with opened(tmp_path / "studies.db", number=number) as records:
            study = open_study(tmp_path, records)
            if number == 1:
                study.runner.events = killed(KilledError)
            try:
                score(study)
            except KilledError:
                assert records.untuned() is None
    with opened(tmp_path / "studies.db", number=3) as records:
        assert records.untuned() is not None


def killed(error: type[BaseException]) -> Any:
    def events(timeout_s: float) -> Any:
        raise error

    return events


def test_what_goes_wrong_is_said_and_tried_again(tmp_path: Path) -> None:
    broken = dataclasses.replace(ONE, fault=Fault.OUT_OF_MEMORY, fault_step=1)
    with opened(tmp_path / "studies.db") as records:
        notes = [event.message for event in score(open_study(tmp_path, records, broken)).of(Note)]
        assert notes[-1] == "Not scored: the untuned model. scripted: out of device memory"
        assert records.untuned() is None
        score(open_study(tmp_path, records))
        assert records.untuned() is not None


def test_it_waits_for_devices_that_others_hold_as_trials_do(tmp_path: Path) -> None:
    with opened(tmp_path / "studies.db") as records:
        study = open_study(tmp_path, records, refusals=100)
        [said] = score(study).of(Waiting)
        assert "Study other holds" in said.message  # type: ignore[attr-defined]
        assert records.untuned() is not None


def test_it_does_not_outlast_the_time_budget(tmp_path: Path) -> None:
    with opened(tmp_path / "studies.db") as records:
        study = open_study(tmp_path, records, refusals=10**6)
        study.run = dataclasses.replace(study.run, deadline=study.runner.now() + 30.0)
        score(study)
        assert study.runner.now() < study.run.deadline + 1.0
        assert records.untuned() is None


def test_leaving_stops_it_and_records_nothing(tmp_path: Path) -> None:
    waiting = dataclasses.replace(ONE, fault=Fault.WAIT, fault_step=1)
    asked = iter([False, False, True])
    with opened(tmp_path / "studies.db") as records:
        study = open_study(tmp_path, records, waiting)
        score(study, lambda: next(asked, True))
        assert study.runner.stopped == [(-1, 1, StopReason.USER)]
        assert (records.untuned(), study.runner.num_running) == (None, 0)


def test_a_new_best_is_told_with_its_paired_difference(tmp_path: Path) -> None:
    sums = {"step": 1, "num_tokens": [1] * 4, "num_correct": [0] * 4}
    for path, total in ((evaluation_path(trial_dir(tmp_path, 2), 1), 1.0), (untuned_path(tmp_path), 3.0)):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**sums, "loss_sums": [total + 0.1 * i * (total > 2) for i in range(4)]}))
    with opened(tmp_path / "studies.db") as records:
        watcher = Watcher()
        compared = AgainstUntuned(open_study(tmp_path, records), watcher)
        compared(TrialMeasured(measurement=evaluation(2, 1, 1)))
        compared(NewBest(trial=2, value=1.0, step=10))
        compared(NewBest(trial=9, value=1.0, step=10))
    first, second = watcher.of(NewBest)
    assert first.over_untuned.is_better  # type: ignore[attr-defined]
    assert second.over_untuned is None  # type: ignore[attr-defined]


def untuned_path(folder: Path) -> Path:
    return evaluation_path(untuned_dir(folder), 0)
