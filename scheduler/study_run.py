"""A study that is being run: what it needs to know, and what changes while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from autosft.profiles.hardware.device import ClusterProfile, DeviceProfile, usable_bytes
from autosft.scheduler.decide import planner
from autosft.scheduler.decide.placement import Option
from autosft.scheduler.decide.pruning import PruningRule
from autosft.scheduler.events import Observer
from autosft.scheduler.idle import IdleMeter
from autosft.studies.study_records import StudyRecords
from autosft.studies.trial import (
    ExecutionPlan,
    Measurement,
    PinnedSettings,
    PromptScoring,
    StopReason,
    TrialJob,
)
from autosft.workers.runner import TrialRunner

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
class Kind:
    """Devices that take the same plans."""

    slots: Slots  # of the one with the least memory
    num_devices: int

    def largest_gang(self, at_most: int | None) -> int:
        """Return how many of them a trial may take; a process can use no more than one slice of a GPU."""
        return 1 if self.slots.device.is_mig else min(self.num_devices, at_most or self.num_devices)


@dataclass(slots=True)
class Running:
    """An attempt that holds devices."""

    job: TrialJob
    leases: tuple[Lease, ...]
    option: Option
    ends_at: float  # predicted, corrected by its reports
    correction: float  # of the plan's predicted speed, by what earlier trials have measured
    stopping: StopReason | None = None
    first: tuple[int, float] | None = None  # step and elapsed seconds of the first report
    # The load of its device over time, its own included: what sharing is learned from.
    company_since: float = 0.0
    company_s: float = 0.0  # seconds so far
    company_load_s: float = 0.0  # integral of the load over them


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A planned way to run a trial: for placing, and for starting."""

    option: Option
    plan: ExecutionPlan
    correction: float = 1.0  # of the predicted speed, in both


@dataclass(slots=True)
class Loop:
    """The changing part of a study that is being run."""

    run: StudyRun
    records: StudyRecords
    runner: TrialRunner
    leases: LeaseBroker
    source: DeviceSource
    observe: Observer
    stop_requested: Callable[[], bool]
    running: dict[int, Running] = field(default_factory=dict)
    present: frozenset[str] | None = None  # UUIDs of the devices that are there
    slots: dict[str, Slots] = field(default_factory=dict)  # of those that take part
    seen: dict[str, Slots | None] = field(default_factory=dict)  # of all that ever were there
    kind_of: dict[str, str] = field(default_factory=dict)  # names of kinds, by UUID
    kinds: dict[str, Kind] = field(default_factory=dict)
    #: Plans of waiting trials, beside what they were made for.
    ways: dict[int, tuple[object, tuple[Way, ...]]] = field(default_factory=dict)
    latest_options: tuple[Option, ...] = ()  # of the trial planned last: what the next is likely to need
    rungs: dict[int, dict[int, float]] = field(default_factory=dict)  # evaluation -> trial -> metric
    durations_s: list[float] = field(default_factory=list)  # of completed trials
    speed_ratios: dict[str, list[float]] = field(default_factory=dict)  # measured over predicted tokens/s,
    # by device name
    overheads: list[float] = field(default_factory=list)  # measured cost of sharing a device
    idle: IdleMeter = field(default_factory=IdleMeter)
    held: set[int] = field(default_factory=set)  # trials that the user has paused
    first_in_line: set[int] = field(default_factory=set)  # trials that the user has resumed
    commands_at: float = float("-inf")  # when users' commands were last asked for
    num_obeyed: int = 0  # commands that are done
    is_paused: bool = False  # the whole study, by the user
    num_lost: Counter[int] = field(default_factory=Counter)  # attempts lost since the last evaluation
    failed_in_a_row: int = 0
    last_wait: float = float("-inf")  # when the user was last told what is waited for
    is_leaving: bool = False
    disk_needed_bytes: int = 0  # free space to wait for, since a worker found the disk full
    was_stopped: bool = False  # by `autosft studies stop`
    best: float | None = None
    reached_target: Measurement | None = None  # the first evaluation that passed the run's target


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
