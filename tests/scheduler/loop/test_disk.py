"""Room for checkpoints: refused before the start, waited for while a study runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.recipe import Method, Sharding
from autosft.scheduler.events import Waiting
from autosft.scheduler.loop import disk
from autosft.studies.trial import TrialJob, TrialState
from tests.plans import GIB, execution_plan, memory_estimate
from tests.scheduler.study_loop import GOOD, opened, states, study_run, tune
from tests.workers.scripted import Fault, Script

MIB = 1 << 20
PLAN = execution_plan(
    estimate=memory_estimate(components=(("parameters", GIB), ("optimizer state", 2 * GIB)))
)


def test_a_checkpoint_is_weights_and_optimizer_state() -> None:
    assert disk.checkpoint_bytes(PLAN, Method.FULL) == 3 * GIB
    assert disk.checkpoint_bytes(PLAN, Method.LORA) == 3 * GIB  # 1 GiB of adapters
    parts = dataclasses.replace(PLAN, data_parallel=4, sharding=Sharding.FSDP)
    assert disk.checkpoint_bytes(parts, Method.FULL) == 12 * GIB


def test_a_study_that_will_not_fit_its_disk_or_budget_is_refused_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demand = disk.CheckpointDemand(
        checkpoint_bytes=GIB, num_trials=9, num_concurrent=2, keep_best=2, is_uploaded=False
    )  # 2 x 2 of the best, 2 x 2 of what runs
    monkeypatch.setattr(disk, "free_bytes", lambda _: 5 * GIB)
    with pytest.raises(UserError, match=r"8 checkpoints of 1\.0 GiB") as raised:
        disk.check_before_start(demand, tmp_path, disk_budget=None, kept_bytes=0)
    assert "3.1 GiB of space" in str(raised.value)
    disk.check_before_start(demand, tmp_path, disk_budget=None, kept_bytes=4 * GIB)
    with pytest.raises(UserError, match="--disk-budget"):
        disk.check_before_start(demand, tmp_path, disk_budget=7 * GIB, kept_bytes=4 * GIB)
    uploaded = dataclasses.replace(demand, is_uploaded=True)
    disk.check_before_start(uploaded, tmp_path, disk_budget=None, kept_bytes=0)


def test_a_study_waits_for_space_and_continues_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([0, 0, 10 * MIB])
    monkeypatch.setattr(disk, "free_bytes", lambda _: next(free, 100 * GIB))
    with opened(tmp_path / "studies.db") as records:
        _, watcher = tune(study_run(tmp_path, num_trials=2, checkpoint_bytes=MIB), records, lambda _: GOOD)
        [waiting] = watcher.of(Waiting)
        assert "The study continues once there is space" in waiting.message  # type: ignore[attr-defined]
        assert states(records) == {TrialState.COMPLETED: 2}


def test_a_disk_that_a_worker_found_full_is_waited_for_and_the_trial_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([GIB, GIB, 100 * MIB, 100 * MIB, 100 * MIB])
    monkeypatch.setattr(disk, "free_bytes", lambda _: next(free, GIB))
    half_written = tmp_path / "trials" / "0000" / "staging-1"
    half_written.mkdir(parents=True)

    def script(job: TrialJob) -> Script:
        return dataclasses.replace(GOOD, fault=Fault.DISK_FULL, fault_step=6) if job.attempt == 1 else GOOD

    with opened(tmp_path / "studies.db") as records:
        run = study_run(tmp_path, num_trials=1, num_slots=1)
        runner, watcher = tune(run, records, script)
        assert len(watcher.of(Waiting)) == 1
        assert str(runner.started[1].resume_from).endswith("step-4")
        assert states(records) == {TrialState.COMPLETED: 1}
    assert not half_written.exists()


def test_leaving_works_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 0)
    calls = iter(range(1000))
    with opened(tmp_path / "studies.db") as records:
        tune(
            study_run(tmp_path, num_trials=1),
            records,
            lambda _: GOOD,
            stop_requested=lambda: next(calls) > 3,
        )
        assert records.num_finished() == 0
