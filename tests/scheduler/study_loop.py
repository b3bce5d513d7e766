"""What tests of the loop share: a study on a virtual clock, with a fake runner and fake leases."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from autosft.profiles.hardware.device import DeviceProfile, usable_bytes
from autosft.profiles.recipe import StepRecipe
from autosft.scheduler.decide.planner import StepSpeed
from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.events import StudyEvent
from autosft.scheduler.loop.tuning import run_study
from autosft.scheduler.study_run import Slots, StudyRun
from autosft.studies.store.records import open_records
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import TrainingSettings, TrialJob, TrialState
from tests.scheduler.decide.test_planner import memory
from tests.scheduler.devices import GIB, gpu
from tests.studies.study_examples import PINNED, driver, spec
from tests.workers.fake_runner import FakeRunner
from tests.workers.scripted import Script

LOSSES = (2.0, 1.8, 1.6, 1.5)
GOOD = Script(num_steps=8, eval_losses=LOSSES)


class NoLease:
    """A lease that need not be given back."""

    def release(self) -> None:
        pass


@dataclass
class FakeLeases:
    """Refuses the first `num_refusals` requests; counts what is held at once."""

    num_refusals: int = 0
    most: int | None = None  # what could be leased if everybody else left; more is refused
    asked: list[int] = field(default_factory=list)

    def acquire(
        self, device: DeviceProfile, num_bytes: int, *, num_threads: int, study: str, trial: int, until: float
    ) -> NoLease | None:
        self.asked.append(num_bytes)
        if len(self.asked) <= self.num_refusals or (self.most is not None and num_bytes > self.most):
            return None
        return NoLease()

    def available_bytes(self, device: DeviceProfile) -> int:
        return usable_bytes(device)

    def holders(self, device: DeviceProfile) -> str:
        return "Study other holds 9.8 GiB until about 14:05."

    def are_held(self, device: DeviceProfile) -> bool:
        return self.most is None

    def most_bytes(self, device: DeviceProfile) -> int:
        return device.total_bytes if self.most is None else self.most


def speed(
    recipe: StepRecipe, micro_batch: int, what: TrainingSettings, device: DeviceProfile, num_threads: int
) -> StepSpeed:
    return StepSpeed(tokens_per_s=1000.0 * micro_batch, run_s=10.0)


def study_run(output: Path, *, num_trials: int, num_slots: int = 2, **changes: object) -> StudyRun:
    run = StudyRun(
        name="study",
        model="model",
        data_dir="data",
        output_dir=output,
        metric="eval_loss",
        minimize=True,
        num_trials=num_trials,
        deadline=None,
        pinned=PINNED,
        rule=PruningRule(),
        slots=tuple(
            Slots(device=gpu(index, free_bytes=80 * GIB), num_slots=1, num_threads=1)
            for index in range(num_slots)
        ),
        keep_best=2,
        trust_remote_code=False,
        estimate=memory,
        speed=speed,
    )
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


@contextmanager
def opened(path: Path, *, now: float = 0.0, number: int = 1) -> Iterator[StudyRecords]:
    with closing(open_records(f"sqlite:///{path}")) as records:
        study = records.open_study(spec(num_trials=30), now=now)
        study.take_over(driver(number), now=now)
        yield study
        study.release(now=now)


@dataclass
class Watcher:
    events: list[StudyEvent] = field(default_factory=list)

    def __call__(self, event: StudyEvent) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[StudyEvent]:
        return [event for event in self.events if isinstance(event, kind)]


def tune(
    run: StudyRun,
    records: StudyRecords,
    script: Callable[[TrialJob], Script],
    *,
    leases: FakeLeases | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> tuple[FakeRunner, Watcher]:
    runner, watcher = FakeRunner(script), Watcher()
    run_study(
        run,
        records=records,
        runner=runner,
        leases=leases or FakeLeases(),
        observe=watcher,
        stop_requested=stop_requested,
    )
    assert runner.num_running == 0
    return runner, watcher


def states(records: StudyRecords) -> Counter[TrialState]:
    return Counter(trial.state for trial in records.trials())
