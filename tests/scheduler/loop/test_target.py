"""A target ends a study once an evaluation passes it beyond chance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autosft.scheduler.events import Note
from autosft.scheduler.loop.target import passes_target
from autosft.studies.files.checkpoints import evaluation_path, trial_dir
from autosft.studies.results.summary import best_trial
from autosft.studies.trial import Measurement, TrialJob, TrialState
from tests.scheduler.study_loop import GOOD, LOSSES, opened, study_run, tune
from tests.workers.scripted import Script

pytestmark = pytest.mark.usefixtures("quick_records")

NUM_EXAMPLES = 100


def write_losses(output: Path, trial: int, evaluation: int, *, mean: float, spread: float) -> None:
    """Write the losses of examples of one token, half of them `spread` above the mean and half below."""
    path = evaluation_path(trial_dir(output, trial), evaluation)
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = [mean + spread * (-1) ** index for index in range(NUM_EXAMPLES)]
    path.write_text(json.dumps({"step": 1, "loss_sums": sums, "num_tokens": [1] * NUM_EXAMPLES}))


# Trials evaluate to 2.0, 1.8, 1.6, 1.5 one after another; half the interval is a fifth of the spread.
STUDIES = {
    "passed with its interval": (1.65, 0.1, 1),
    "passed by the value alone": (1.65, 1.0, 3),
    "never passed": (1.2, 0.1, 3),
}


@pytest.mark.parametrize("case", STUDIES)
def test_a_target_ends_the_study_once_it_is_passed_beyond_chance(tmp_path: Path, case: str) -> None:
    target, spread, num_started = STUDIES[case]

    def script(job: TrialJob) -> Script:
        for evaluation, loss in enumerate(LOSSES, start=1):
            write_losses(tmp_path, job.trial, evaluation, mean=loss, spread=spread)
        return GOOD

    with opened(tmp_path / "studies.db") as records:
        run = study_run(tmp_path, num_trials=3, num_slots=1, target=target)
        runner, watcher = tune(run, records, script)
        assert len(runner.started) == num_started
        notes = [item.message for item in watcher.of(Note) if isinstance(item, Note)]
        assert any("target is reached" in note for note in notes) is (num_started == 1)
        missed = [
            note
            for note in notes
            if "was not reached with 95 % confidence: the best has eval_loss 1.5" in note
        ]
        assert len(missed) == (num_started != 1)
        if num_started == 1:  # in the middle of its run; it is a result, and the winner
            [winner] = records.trials()
            assert (winner.state, winner.message) == (TrialState.STOPPED, "target reached")
            assert best_trial(records.trials(), maximize=False) == winner
        runner, _ = tune(run, records, script)  # again: nothing more to do
        assert runner.started == []


def evaluation(**metrics: float) -> Measurement:
    return Measurement(
        trial=0,
        attempt=1,
        step=5,
        num_steps=10,
        num_tokens=100,
        loss=None,
        grad_norm=None,
        learning_rate=None,
        tokens_per_s=None,
        peak_allocated_bytes=None,
        peak_reserved_bytes=None,
        metrics=tuple(metrics.items()),
        evaluation=1,
    )


# 30 % of 541 prompts: between 26.3 % and 34.0 % (Wilson); 30 % of 50: between 19.1 % and 43.8 %
PROMPTS = {
    "many prompts": (evaluation(ifeval=0.30, ifeval_prompts=541.0), True),
    "few prompts": (evaluation(ifeval=0.30, ifeval_prompts=50.0), False),
    "below": (evaluation(ifeval=0.24, ifeval_prompts=541.0), False),
    "another metric": (evaluation(eval_loss=0.1), False),
    "no evaluation": (replace(evaluation(ifeval=0.5, ifeval_prompts=541.0), evaluation=None), False),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_share_of_prompts_passes_with_the_lower_end_of_its_interval(tmp_path: Path, case: str) -> None:
    measurement, passes = PROMPTS[case]
    run = study_run(tmp_path, num_trials=1, metric="ifeval", minimize=False, target=0.25)
    assert passes_target(run, measurement) is passes


def test_without_losses_by_example_nothing_is_certain(tmp_path: Path) -> None:
    run = study_run(tmp_path, num_trials=1, target=2.0)
    assert not passes_target(run, evaluation(eval_loss=1.0))
    write_losses(tmp_path, 0, 1, mean=1.0, spread=0.1)
    assert passes_target(run, evaluation(eval_loss=1.0))
    assert not passes_target(replace(run, target=None), evaluation(eval_loss=1.0))
