"""A study that is being run: what it needs to know, and what changes while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from autosft.profiles.hardware import DeviceKind, DeviceProfile
from autosft.scheduler import planner
from autosft.scheduler.events import Observer
from autosft.scheduler.pruning import PruningRule
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import PinnedSettings, TrialJob
from autosft.workers.runner import TrialRunner


class Lease(Protocol):
    """Bytes of a device that are ours until released or until this process dies."""

    def release(self) -> None: ...


class LeaseBroker(Protocol):
    """Keeps several autosft processes of a machine from booking the same bytes."""

    def acquire(
        self, device: DeviceProfile, num_bytes: int, *, num_threads: int, study: str, trial: int, until: float
    ) -> Lease | None:
        """Return a lease, or None when other holders leave too little."""
        ...

    def holders(self, device: DeviceProfile) -> str:
        """Say in words who holds what until about when."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many trials share a device, and with how many CPU threads each."""

    device: DeviceProfile
    num_slots: int
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRun:
    """A prepared study: what `run_study` needs to know and nothing it has to find out."""

    name: str
    model: str
    data_dir: str
    output_dir: Path
    metric: str
    minimize: bool
    num_trials: int
    deadline: float | None  # UNIX seconds
    pinned: PinnedSettings
    rule: PruningRule
    slots: tuple[Slots, ...]
    keep_best: int  # checkpoints kept over the whole study
    trust_remote_code: bool
    estimate: planner.Estimator
    speed: planner.SpeedModel


class StudyFailedError(Exception):
    """The work itself keeps failing: exit code 1."""


@dataclass(slots=True)
class Running:
    """An attempt that holds a device."""

    job: TrialJob
    lease: Lease
    promised_bytes: int
    stopping: bool = False


@dataclass(slots=True)
class Loop:
    """The changing part of a study that is being run."""

    run: StudyRun
    records: StudyRecords
    runner: TrialRunner
    leases: LeaseBroker
    observe: Observer
    stop_requested: Callable[[], bool]
    running: dict[int, Running] = field(default_factory=dict)
    failed_in_a_row: int = 0
    speed_ratios: list[float] = field(default_factory=list)  # measured over predicted tokens/s
    last_wait: float = 0.0  # when the user was last told what is waited for
    is_leaving: bool = False
    best: float | None = None


def usable_bytes(device: DeviceProfile) -> int:
    """What trials may take of a device: all that is free on a GPU, nine tenths of free RAM on a CPU."""
    return device.free_bytes if device.kind is DeviceKind.CUDA else device.free_bytes * 9 // 10
