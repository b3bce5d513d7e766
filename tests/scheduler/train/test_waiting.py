"""`autosft train` and final scores wait for devices as a study does, and say for whom."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.device import DeviceKind
from autosft.profiles.hardware.leases import Leases
from autosft.profiles.recipe import Sharding
from autosft.scheduler.events import Note, Waiting
from autosft.scheduler.finish import evaluations
from autosft.scheduler.finish.evaluations import Evaluation, Queue, on_one_device
from autosft.scheduler.loop import leasing
from autosft.scheduler.study_run import Slots
from autosft.scheduler.train import attempt
from autosft.studies.trial import TrialJob
from tests.scheduler.devices import GIB, gpu
from tests.scheduler.study_loop import FakeLeases, NoLease
from tests.workers.scripted import make_job

DEVICE = gpu()


@pytest.fixture
def leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leases:
    monkeypatch.setattr(leasing, "refresh", lambda cluster: cluster)
    monkeypatch.setattr(attempt, "Leases", lambda: Leases(tmp_path))
    return Leases(tmp_path)


def job(num_bytes: int) -> TrialJob:
    return make_job(memory_cap_bytes=num_bytes, device_uuids=(DEVICE.uuid,))


def hold(leases: Leases, num_bytes: int) -> Any:
    return leases.acquire(
        DEVICE.uuid, num_bytes, total_bytes=24 * GIB, free_bytes=24 * GIB, study="other", trial=0
    )


def test_training_waits_until_the_other_run_has_ended(leases: Leases) -> None:
    held = hold(leases, 20 * GIB)
    told: list[Any] = []
    num_sleeps = 0

    def sleep(duration_s: float) -> None:
        nonlocal num_sleeps
        num_sleeps += 1
        if num_sleeps == 3:
            held.release()

    stack = attempt.lease_or_wait(
        job(10 * GIB), [DEVICE], observe=told.append, stop_requested=lambda: False, sleep=sleep
    )
    assert stack is not None
    assert num_sleeps == 3
    assert [type(event) for event in told] == [Waiting], "once a minute, not at every look"
    assert hold(leases, 20 * GIB) is None, "it holds the device"
    stack.close()
    assert hold(leases, 20 * GIB) is not None


def test_whoever_wants_to_leave_need_not_wait(leases: Leases) -> None:
    hold(leases, 20 * GIB)
    answers = iter([False, False, True])
    stack = attempt.lease_or_wait(
        job(10 * GIB),
        [DEVICE],
        observe=lambda _: None,
        stop_requested=lambda: next(answers),
        sleep=lambda _: None,
    )
    assert stack is None
    end = attempt.left_waiting(job(GIB))
    assert (end.failure, end.completed, end.stopped.value if end.stopped else "") == (None, False, "shutdown")


def test_what_no_waiting_would_make_room_for_is_refused_with_the_figures(
    leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = dataclasses.replace(DEVICE, kind=DeviceKind.CPU, total_bytes=2 * GIB, free_bytes=GIB, num_cores=4)
    monkeypatch.setattr(leasing, "own_bytes", lambda: GIB)
    with pytest.raises(UserError, match=r"of which autosft itself takes 1\.0 GiB"):
        attempt.lease_or_wait(
            job(3 * GIB // 2),
            [cpu],
            observe=lambda _: None,
            stop_requested=lambda: False,
            sleep=lambda _: None,
        )


# --- final scores -------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.time = 0.0
        self.started: list[TrialJob] = []
        self.told: list[Any] = []

    def now(self) -> float:
        return self.time

    def run(self, started: TrialJob) -> None:
        self.started.append(started)


class Held(FakeLeases):
    """Leases that another run (`is_ours`) or other programs hold for a while."""

    def __init__(self, clock: Clock, *, until: float, is_ours: bool) -> None:
        super().__init__()
        self.clock, self.until, self.is_ours = clock, until, is_ours

    def acquire(self, device: Any, num_bytes: int, **_: Any) -> NoLease | None:
        return NoLease() if self.clock.time >= self.until else None

    def are_held(self, device: Any) -> bool:
        return self.is_ours and self.clock.time < self.until


def queue_of(scored: TrialJob, leases: Any, clock: Clock, *, total_bytes: int, weights: int) -> Queue:
    """Return a queue of one evaluation, for a study with one device like the one that it is planned for."""
    device = dataclasses.replace(
        DEVICE, name=scored.plan.device_name, total_bytes=total_bytes, free_bytes=total_bytes
    )
    study = SimpleNamespace(
        runner=clock,
        leases=leases,
        model=SimpleNamespace(num_parameters=weights // scored.pinned.precision.weight_bytes),
        run=SimpleNamespace(slots=(Slots(device=device, num_slots=1, num_threads=1),), pinned=scored.pinned),
    )
    evaluation = Evaluation(
        job=scored,
        name="trial 0 step 8",
        keep=lambda _: None,
        skipped="Not evaluated again",
        after="It is evaluated after that.",
    )
    return Queue(study=study, observe=clock.told.append, waiting=[evaluation], told_at=0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("until", "is_ours", "is_scored"),
    [(40.0, True, True), (4000.0, True, True), (40.0, False, True), (4000.0, False, False)],
    ids=["a short wait", "a long wait", "other programs, short", "other programs, for ever"],
)
def test_final_scores_wait_for_the_device(until: float, is_ours: bool, is_scored: bool) -> None:
    clock = Clock()
    held = Held(clock, until=until, is_ours=is_ours)
    queue = queue_of(job(GIB), held, clock, total_bytes=24 * GIB, weights=GIB // 2)
    while queue.waiting:
        evaluations.start(queue)
        clock.time += 10.0
    assert bool(clock.started) == is_scored
    assert [type(event) for event in clock.told] == ([Waiting] if is_scored else [Waiting, Note])


@pytest.mark.parametrize(
    ("total", "weights", "booked"),
    [(24, 1, 8), (6, 1, 6), (6, 4, 6), (6, 7, None)],
    ids=["room for all", "less than training took", "little more than the weights", "less than the weights"],
)
def test_a_device_that_never_has_what_training_took_is_not_waited_for(
    total: int, weights: int, booked: int | None
) -> None:
    """A gang has shards on two devices, 4 GiB each with a context; the whole model is evaluated on one."""
    clock = Clock()
    made = job(3 * GIB)
    gang = dataclasses.replace(made.plan, data_parallel=2, sharding=Sharding.FSDP)
    alone = dataclasses.replace(made, plan=on_one_device(gang))
    assert (alone.plan.booked_bytes, alone.plan.data_parallel) == (8 * GIB, 1)
    leases = FakeLeases(most=total * GIB)
    queue = queue_of(alone, leases, clock, total_bytes=total * GIB, weights=weights * GIB)
    evaluations.start(queue)
    assert queue.waiting == []
    if booked is None:
        [said] = clock.told
        assert "has to hold the 7.0 GiB of the whole model's weights" in said.message
        assert clock.started == []
    else:
        assert [started.plan.booked_bytes for started in clock.started] == [booked * GIB]
        assert clock.told == []
