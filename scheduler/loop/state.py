"""What changes while a study runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from autosft.scheduler.decide.measured_memory import NOTHING_MEASURED, MeasuredMemory
from autosft.scheduler.decide.placement import Option
from autosft.scheduler.events import Observer
from autosft.scheduler.loop.idle import IdleMeter
from autosft.scheduler.study_run import DeviceSource, Lease, LeaseBroker, Slots, StudyRun
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import ExecutionPlan, Measurement, StopReason, TrialJob
from autosft.workers.runner import TrialRunner


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
    measured: MeasuredMemory = NOTHING_MEASURED  # the run's, and what its own trials have taken since
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
