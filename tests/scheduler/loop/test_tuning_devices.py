"""The loop over several devices: sharing, gangs, unlike ones, and those that join and leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile
from autosft.profiles.recipe import ByteRange, MemoryEstimate, StepRecipe
from autosft.scheduler.decide.planner import StepSpeed
from autosft.scheduler.events import Note, TrialStarted, Waiting
from autosft.scheduler.loop.tuning import run_study
from autosft.scheduler.study_run import Slots
from autosft.studies.trial import TrainingSettings, TrialJob, TrialState
from tests.scheduler.decide.test_planner import memory
from tests.scheduler.devices import GIB, gpu
from tests.scheduler.study_loop import (
    GOOD,
    FakeLeases,
    Watcher,
    opened,
    speed,
    states,
    study_run,
    tune,
)
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Script

pytestmark = pytest.mark.usefixtures("quick_records")


def sharing(number: int, **device: object) -> tuple[Slots, ...]:
    return (Slots(device=gpu(0, **device), num_slots=number, num_threads=1),)  # type: ignore[arg-type]


def quarter_busy(*given: object) -> StepSpeed:
    return dataclasses.replace(speed(*given), device_share=0.25)  # type: ignore[arg-type]


@pytest.mark.slow
def test_small_trials_share_a_gpu_as_far_as_its_memory_goes(database: Path, tmp_path: Path) -> None:
    """4 GiB and more a trial: three of them fit 21 GiB with a third each, and a fourth never joins."""
    at_once: list[int] = []
    with opened(database) as records:
        run = study_run(tmp_path, num_trials=9, slots=sharing(3, free_bytes=21 * GIB), speed=quarter_busy)

        def script(job: TrialJob) -> Script:
            running = [trial for trial in records.trials() if trial.state is TrialState.RUNNING]
            at_once.append(len(running))
            assert sum(item.plan.estimate.total_bytes for item in running if item.plan) <= 21 * GIB
            return GOOD

        tune(run, records, script)
        assert states(records) == {TrialState.COMPLETED: 9}
        assert max(at_once) == 3


def test_sharing_that_costs_too_much_is_abandoned(database: Path, tmp_path: Path) -> None:
    """Alone 100 tokens/s are measured, together a tenth of it, whatever the loads promised."""
    with opened(database) as records:
        alone: list[bool] = []

        def script(job: TrialJob) -> Script:
            num = sum(trial.state is TrialState.RUNNING for trial in records.trials())
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


def test_the_last_trials_take_the_devices_that_would_be_idle(database: Path, tmp_path: Path) -> None:
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


def test_different_devices_get_the_plans_that_fit_them(database: Path, tmp_path: Path) -> None:
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
            assert sum(trial.state is TrialState.RUNNING for trial in records.trials()) <= 2
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
        notes = [item.message for item in watcher.of(Note)]  # type: ignore[attr-defined]
        assert any("GPU-1) on here has joined" in note for note in notes)
        assert any("GPU-0) on here has left" in note for note in notes)
        assert any("no device" in item.message for item in watcher.of(Waiting))  # type: ignore[attr-defined]
