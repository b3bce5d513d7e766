"""What a study needs in order to run: its values, and the interfaces to devices and leases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile, usable_bytes
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.measured_memory import NOTHING_MEASURED, MeasuredMemory
from autosft.scheduler.decide.pruning import PruningRule
from autosft.studies.search.freeze_thaw.proposal import EarlierStudy
from autosft.studies.trial import (
    PinnedSettings,
    PromptScoring,
)

#: Origin of trials that a user has queued while the study was running.
ENQUEUED_ORIGIN = "enqueued"

#: Devices whose usable memory differs by less than this share are planned for alike.
MEMORY_STEP = 1 / 64


class Lease(Protocol):
    """Bytes of a device reserved for this process until it releases them or dies."""

    def release(self) -> None: ...


class LeaseBroker(Protocol):
    """Keeps the autosft processes of a machine from using the same bytes."""

    def acquire(
        self, device: DeviceProfile, num_bytes: int, *, num_threads: int, study: str, trial: int, until: float
    ) -> Lease | None:
        """Return a lease, or None if other holders leave too little."""
        ...

    def available_bytes(self, device: DeviceProfile) -> int:
        """Return how many bytes of a device could be leased now."""
        ...

    def holders(self, device: DeviceProfile) -> str:
        """Describe for the user who holds how much of a device until when."""
        ...

    def are_held(self, device: DeviceProfile) -> bool:
        """Whether another autosft process holds or waits for some of a device, so that waiting will end."""
        ...

    def most_bytes(self, device: DeviceProfile) -> int:
        """Return what could be leased of a device if everybody else left it; asked while no trial runs."""
        ...


class DeviceSource(Protocol):
    """Knows the available devices; on a cluster, nodes join and leave while a study runs."""

    def devices(self) -> ClusterProfile:
        """Return the available devices; called before every placement, so it has to be fast.

        A device keeps its UUID while it is available.  Its free memory is that at its first appearance.
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
    """A study that is ready to run: everything `run_study` needs to know.  Built once, complete."""

    name: str
    model: str  # folder or hub id
    data_dir: str  # prepared data: a folder, or its URL
    output_dir: Path
    metric: str
    minimize: bool
    num_trials: int
    deadline: float | None  # UNIX seconds
    pinned: PinnedSettings
    rule: PruningRule
    slots: tuple[Slots, ...]  # the devices available at the start
    keep_best: int  # checkpoints kept over the whole study
    trust_remote_code: bool
    estimate: planner.Estimator
    speed: planner.SpeedModel
    measured: MeasuredMemory = NOTHING_MEASURED  # memory measured by earlier trials of the model
    max_concurrent: int | None = None  # maximum number of trials at once
    report_to: tuple[str, ...] = ()  # trackers that every trial reports to
    max_devices_per_trial: int | None = None
    is_mps_on: bool = False
    #: Returns how a device that joins later is shared; None if it cannot be used.
    share: Callable[[DeviceProfile], Slots | None] = lambda _: None
    scoring: PromptScoring | None = None  # set for a metric of prompts
    budget_runs: float | None = None  # training tokens after which nothing is started, in full runs
    target: float | None = None  # value of the metric at which the study ends, once it is beyond chance
    allow_degrade: bool = False  # whether settings that do not fit may be changed; changes are recorded
    checkpoint_bytes: int = 0  # predicted size of a checkpoint with its resume state
    disk_budget: int | None = None  # bytes that the study's checkpoints may take
    earlier: tuple[EarlierStudy, ...] = ()  # studies that a freeze-thaw search learns from
    expected_share: float = 1.0  # of a full run that a trial takes on average, with pruning as planned
    store_url: str | None = (
        None  # of this study, if --output is a URL; output_dir is then local to this machine
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a run of a study measured about itself."""

    num_gaps: int  # between two attempts on a device
    idle_s: float  # total over these gaps
    median_gap_s: float | None
    overhead: float | None  # measured cost of sharing a device, as a factor
    paused_trials: tuple[int, ...]  # by the user, and not resumed
    was_stopped: bool  # by the user, with `autosft studies stop`


def planning_class(device: DeviceProfile) -> str:
    """Return a name shared by all devices that can take the same plans."""
    step = max(1, round(device.total_bytes * MEMORY_STEP))
    return f"{device.name}, {usable_bytes(device) // step}/{round(1 / MEMORY_STEP)} free"
