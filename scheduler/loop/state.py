"""The state of a running study, in parts.

Each part is written by one module, which its docstring names, and read by all; a test checks this.  Decisions
are made by pure functions over these values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from autosft.scheduler.decide.measured_memory import NOTHING_MEASURED, MeasuredMemory
from autosft.scheduler.decide.occupancy import Option
from autosft.scheduler.events import Observer
from autosft.scheduler.loop.idle import IdleMeter
from autosft.scheduler.study_run import DeviceSource, Lease, LeaseBroker, Slots, StudyRun
from autosft.studies.search.freeze_thaw.proposal import Next
from autosft.studies.store.study_records import StudyRecords
from autosft.studies.trial import ExecutionPlan, Measurement, StopReason, TrialJob
from autosft.workers.runner import TrialRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGroup:
    """Devices that are planned for alike."""

    slots: Slots  # of the device with the least memory
    num_devices: int

    def largest_gang(self, at_most: int | None) -> int:
        """Return how many devices one trial may use; a process can use no more than one slice of a GPU."""
        return 1 if self.slots.device.is_mig else min(self.num_devices, at_most or self.num_devices)


@dataclass(slots=True)
class Fleet:
    """The devices of the study.  Written by `fleet`."""

    present: frozenset[str] | None = None  # UUIDs of the available devices; None before the first refresh
    slots: dict[str, Slots] = field(default_factory=dict)  # by UUID, of the devices in use
    known: dict[str, Slots | None] = field(default_factory=dict)  # of all devices that were ever available
    group_of: dict[str, str] = field(default_factory=dict)  # UUID -> name of its group
    groups: dict[str, DeviceGroup] = field(default_factory=dict)  # by name


@dataclass(slots=True)
class RunningAttempt:
    """An attempt that holds devices.  Written by `attempts`."""

    job: TrialJob
    leases: tuple[Lease, ...]
    option: Option
    ends_at: float  # predicted, corrected by its reports
    speed_correction: float  # factor on the plan's predicted speed, from earlier trials
    stop_reason: StopReason | None = None  # why it was asked to stop
    first_report: tuple[int, float] | None = None  # (step, elapsed seconds)
    # Load of its devices over time, including its own: used to learn the cost of sharing a device.
    load_since: float = 0.0  # when the load was last integrated
    load_s: float = 0.0  # seconds integrated so far
    load_integral_s: float = 0.0  # integral of the load over these seconds
    slowdowns: list[float] = field(default_factory=list)  # of its steps by other programs, as it reported


@dataclass(slots=True)
class Attempts:
    """The attempts that run now.  Written by `attempts`."""

    running: dict[int, RunningAttempt] = field(default_factory=dict)  # by trial


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """A plan of a trial for one group of devices, with its placement option."""

    option: Option
    plan: ExecutionPlan
    speed_correction: float = 1.0  # factor on the predicted speed, included in both


@dataclass(slots=True)
class PlanCache:
    """The plans of waiting trials.  Written by `plan_trial`."""

    by_trial: dict[int, tuple[object, tuple[TrialPlan, ...]]] = field(default_factory=dict)  # (key, plans)
    latest_options: tuple[Option, ...] = ()  # of the trial planned last: a guess for the next one


@dataclass(slots=True)
class Observations:
    """What the trials have measured.  Written by `results`."""

    memory: MeasuredMemory = NOTHING_MEASURED  # from earlier studies and this study's trials
    rungs: dict[int, dict[int, float]] = field(default_factory=dict)  # evaluation -> trial -> metric
    durations_s: list[float] = field(default_factory=list)  # of completed trials
    best: float | None = None
    reached_target: Measurement | None = None  # the first evaluation that passed the study's target
    num_lost: Counter[int] = field(
        default_factory=Counter
    )  # by trial, attempts lost since its last evaluation
    failed_in_a_row: int = 0


@dataclass(slots=True)
class ObservedSpeed:
    """How fast trials ran, compared with their predictions.  Written by `colocation`."""

    ratios: dict[str, list[float]] = field(default_factory=dict)  # device name -> measured / predicted
    overheads: list[float] = field(default_factory=list)  # measured cost of sharing a device, as a factor


@dataclass(slots=True)
class UserRequests:
    """What users have asked of the running study.  Written by `user_commands`."""

    paused_trials: set[int] = field(default_factory=set)
    prioritized_trials: set[int] = field(default_factory=set)  # resumed, and not started since
    is_paused: bool = False  # the whole study
    is_stopped: bool = False  # the whole study, by `autosft studies stop`
    polled_at: float = float("-inf")  # when the database was last polled for commands
    num_done: int = 0  # commands carried out


@dataclass(slots=True)
class DiskShortage:
    """Whether a worker found the disk full.  Written by `disk`."""

    needed_bytes: int = 0  # free space to wait for


@dataclass(frozen=True, slots=True)
class Pause:
    """A time in which nothing is tried, on a clock that may be set: ends too if it is set back before it."""

    begin: float = float("-inf")
    end: float = float("-inf")

    def has(self, now: float) -> bool:
        return self.begin <= now < self.end


@dataclass(slots=True)
class BackOff:
    """What failed around the trials, and until when nothing is tried again.  Written by `backing_off`."""

    pause: Pause = Pause()  # of the whole study
    since: float = float("-inf")  # the first failure in a row
    num_in_a_row: int = 0
    cause: str = ""
    told: Pause = Pause()  # that the user was told of
    trials: dict[int, Pause] = field(default_factory=dict)  # of trials whose workers were lost


@dataclass(slots=True)
class WaitNotices:
    """When the user was last told what the study is waiting for.  Written by `waiting`."""

    last_at: float = float("-inf")


@dataclass(slots=True)
class ThawCache:
    """What a freeze-thaw search decided last.  Written by `thawing`."""

    key: object = None  # what it was decided from
    found: Next | None = None


@dataclass(slots=True)
class Shutdown:
    """Whether the run is ending early.  Written by `tuning`."""

    has_begun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A running study: its inputs, and the parts of its state."""

    run: StudyRun
    records: StudyRecords
    runner: TrialRunner
    leases: LeaseBroker
    devices: DeviceSource
    observe: Observer
    stop_requested: Callable[[], bool]

    fleet: Fleet = field(default_factory=Fleet)
    attempts: Attempts = field(default_factory=Attempts)
    plans: PlanCache = field(default_factory=PlanCache)
    observed: Observations = field(default_factory=Observations)
    speed: ObservedSpeed = field(default_factory=ObservedSpeed)
    user: UserRequests = field(default_factory=UserRequests)
    disk: DiskShortage = field(default_factory=DiskShortage)
    backoff: BackOff = field(default_factory=BackOff)
    notices: WaitNotices = field(default_factory=WaitNotices)
    thaw: ThawCache = field(default_factory=ThawCache)
    shutdown: Shutdown = field(default_factory=Shutdown)
    idle: IdleMeter = field(default_factory=IdleMeter)  # updates itself
