"""A study that is being run: what it needs to know, and what changes while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile, usable_bytes
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.measured_memory import NOTHING_MEASURED, MeasuredMemory
from autosft.scheduler.decide.pruning import PruningRule
from autosft.studies.trial import (
    PinnedSettings,
    PromptScoring,
)

#: Devices whose usable memory differs by less than this share of it take the same plans.
KIND_STEP = 1 / 64


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

    def available_bytes(self, device: DeviceProfile) -> int:
        """Return how much of a device could be leased at this moment."""
        ...

    def holders(self, device: DeviceProfile) -> str:
        """Say in words who holds what until about when."""
        ...


class DeviceSource(Protocol):
    """Says which devices there are; on a cluster nodes join and leave while a study runs."""

    def devices(self) -> ClusterProfile:
        """Return the devices that are there now; asked before every placement, so it has to be quick.

        A device keeps its UUID as long as it is there.  What is free on it counts as of its first appearance.
        """
        ...


@dataclass(frozen=True, slots=True)
class StaticDevices:
    """Devices that neither join nor leave."""

    cluster: ClusterProfile

    def devices(self) -> ClusterProfile:
        return self.cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """How many trials may share a device, and with how many CPU threads each."""

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
    slots: tuple[Slots, ...]  # the devices that are there at the start
    keep_best: int  # checkpoints kept over the whole study
    trust_remote_code: bool
    estimate: planner.Estimator
    speed: planner.SpeedModel
    measured: MeasuredMemory = NOTHING_MEASURED  # what earlier trials of the model have taken
    max_concurrent: int | None = None  # trials at once
    report_to: tuple[str, ...] = ()  # trackers that every trial reports to
    max_devices_per_trial: int | None = None
    is_mps_on: bool = False
    #: How a device that joins later is shared; None where it cannot take part.
    share: Callable[[DeviceProfile], Slots | None] = lambda _: None
    scoring: PromptScoring | None = None  # with --metric ifeval
    target: float | None = None  # of the metric: reached beyond chance, the study ends
    allow_degrade: bool = False  # settings may change where they do not fit, recorded
    checkpoint_bytes: int = 0  # predicted size of a checkpoint with its resume state
    disk_budget: int | None = None  # bytes that the study's checkpoints may take
    store_url: str | None = (
        None  # of this study, with a URL as --output; output_dir is this machine's own then
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a run of a study has measured of itself."""

    num_gaps: int  # between two trials on a device
    idle_s: float  # in all
    median_gap_s: float | None
    overhead: float | None  # measured cost of sharing a device, as a factor
    held: tuple[int, ...]  # trials that the user has paused and not resumed
    was_stopped: bool  # by `autosft studies stop`


def sort_of(device: DeviceProfile) -> str:
    """Name what a device has in common with others that it can be planned for like them."""
    step = max(1, round(device.total_bytes * KIND_STEP))
    return f"{device.name}, {usable_bytes(device) // step}/{round(1 / KIND_STEP)} free"
