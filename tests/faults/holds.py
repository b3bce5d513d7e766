"""What must hold of a study whatever was done to it: that it is what it would have been without."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import sqlalchemy as sa

from autosft.scheduler.loop.transitions import MAX_LOST_ATTEMPTS
from autosft.studies.files.checkpoints import verify
from autosft.studies.store import tables
from autosft.studies.store.records import open_records
from autosft.studies.trial import TrialRecord, TrialState
from tests.faults import training
from tests.faults.chaos import Chaos, story
from tests.faults.driver import KEEP_BEST, NUM_EVALUATIONS, STUDY


def check(chaos: Chaos) -> None:
    """Assert that the study is what it would have been without the kills."""
    records = open_records(chaos.url)
    try:
        study = records.read_study(STUDY)
        trials = study.trials()
        finished = [trial for trial in trials if trial.state.is_finished]
        assert len(finished) == chaos.num_trials, f"{len(finished)} of {chaos.num_trials}; {story(chaos)}"
        assert [trial.number for trial in trials] == list(range(len(trials)))
        losses = collections.Counter(
            attempt.trial for attempt in study.attempts() if attempt.outcome == "worker lost"
        )
        for trial in trials:
            # One that is lost so often is given up; it does not count, and another takes its place.
            is_given_up = trial.state is TrialState.FAILED and losses[trial.number] >= MAX_LOST_ATTEMPTS
            assert trial.state.is_finished or is_given_up, f"trial {trial.number}; {story(chaos)}"
            check_curve(trial)
        kept = study.checkpoints()
        for checkpoint in kept:
            state = json.loads((Path(checkpoint.path) / training.STATE).read_text())
            verify(Path(checkpoint.path))
            assert state["step"] == checkpoint.step
            if checkpoint.evaluation is not None:
                assert training.loss_of(state["state"]) == checkpoint.value, checkpoint
                [measured] = [
                    measurement
                    for measurement in trials[checkpoint.trial].measurements
                    if measurement.evaluation == checkpoint.evaluation
                ]
                assert measured.metric("eval_loss") == checkpoint.value
        on_disk = set((chaos.folder / "output" / "trials").glob("*/checkpoints/*"))
        assert {Path(item.path) for item in kept} <= on_disk
        assert len(kept) <= KEEP_BEST
    finally:
        records.close()
    check_rows(chaos)
    said = (chaos.folder / "driver.log").read_text(errors="replace")
    assert "(raylet)" not in said, "Ray's words on what died reached the terminal"
    assert list((chaos.folder / "leases").glob("*.json")) == [], "a lease is left"


def check_curve(trial: TrialRecord) -> None:
    """Assert that a trial's learning curve is the one that it would have had."""
    expected = training.curve(trial.settings, NUM_EVALUATIONS)
    measured = [measurement.metric("eval_loss") for measurement in trial.measurements]
    assert measured == expected[: len(measured)], f"trial {trial.number} learned something else"
    assert [measurement.evaluation for measurement in trial.measurements] == list(range(1, len(measured) + 1))
    assert trial.value == min(expected[: len(measured)], default=None)
    if trial.state is TrialState.COMPLETED:
        assert len(measured) == NUM_EVALUATIONS


def check_rows(chaos: Chaos) -> None:
    """Assert on the tables themselves: each result once, no attempt open, Optuna's tables alike."""
    engine = sa.create_engine(chaos.url.replace("postgresql://", "postgresql+psycopg://"))
    trials, attempts, measurements = tables.trials, tables.attempts, tables.measurements
    with engine.connect() as connection:
        open_attempts = sa.select(sa.func.count()).where(attempts.c.ended_at.is_(None))
        assert connection.scalar(open_attempts) == 0
        by_trial = (
            sa.select(trials.c.number, trials.c.state, attempts.c.outcome)
            .join(attempts, attempts.c.trial_id == trials.c.id)
            .where(attempts.c.outcome.in_(["completed", "pruned"]))
        )
        results = collections.Counter(row.number for row in connection.execute(by_trial))
        assert set(results.values()) == {1}, f"a result is recorded twice: {results}"
        assert len(results) == chaos.num_trials
        twice = (
            sa.select(measurements.c.attempt_id)
            .group_by(measurements.c.attempt_id, measurements.c.step, measurements.c.evaluation)
            .having(sa.func.count() > 1)
        )
        assert connection.execute(twice).all() == []
        optuna = sa.text("SELECT state, count(*) FROM trials GROUP BY state")
        states = {str(state): int(number) for state, number in connection.execute(optuna).all()}
        assert states.get("RUNNING", 0) == 0
        assert states.get("COMPLETE", 0) + states.get("PRUNED", 0) == chaos.num_trials
    engine.dispose()
