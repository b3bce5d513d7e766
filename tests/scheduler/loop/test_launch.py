"""What comes next is loaded while the trials before it run, and only where something comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scheduler.loop.test_tuning import GOOD, opened, study_run, tune


@pytest.mark.parametrize(("num_slots", "expect"), [(1, {0, 1}), (2, {0, 1}), (3, set())])
def test_every_trial_but_the_last_ones_has_the_next_one_prepared(
    tmp_path: Path, num_slots: int, expect: set[int]
) -> None:
    with opened(tmp_path / "studies.db") as records:
        run = study_run(tmp_path, num_trials=3, num_slots=num_slots)
        runner, _ = tune(run, records, lambda job: GOOD)
    assert {item.trial for item in runner.prepared} - {2} == expect
    assert all(item.resume_from is None for item in runner.prepared)
    assert len(runner.started) == 3
