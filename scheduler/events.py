"""Events that the tuning loop reports to observers.

Values only: the live view, plain lines and JSON lines are all rendered from these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autosft.studies.results.paired import PairedDifference
from autosft.studies.trial import Measurement, TrialRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOpened:
    """The study is in the database and its devices are known."""

    study: str
    plan_lines: tuple[str, ...]  # the plan for the user: what fits, why, how long it takes
    num_trials: int
    num_finished: int  # from earlier runs of the same study
    metric: str
    minimize: bool
    deadline: float | None  # UNIX seconds
    earlier: tuple[TrialRecord, ...] = ()  # trials of earlier runs of the same study
    expected_share: float = 1.0  # of a full run that a trial takes on average, with pruning as planned
    num_slots: int = 0  # trials at once, as planned; 0: not known
    untuned: float | None = None  # the metric of the untuned model, where an earlier run has scored it


@dataclass(frozen=True, slots=True, kw_only=True)
class UntunedScored:
    """The model as it is before tuning was evaluated as trials are."""

    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted:
    """An attempt has its devices and is running."""

    record: TrialRecord
    attempt: int
    device_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialMeasured:
    """A running attempt reported progress or an evaluation."""

    measurement: Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialForecast:
    """What a freeze-thaw search expects of a trial that was just evaluated, and what it does with it."""

    trial: int
    end: float  # of the study's metric, predicted at the end of the run
    low: float  # 95 % interval of it, low < high
    high: float
    gain: float  # expected improvement on the best so far, in log loss
    cost: float  # of going on, in full runs, as expected
    goes_on: bool
    reason: str  # why, for the user


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnded:
    """An attempt ended; `record.state` is the trial's new state."""

    record: TrialRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBest:
    """A trial's checkpoint is now the best of the study."""

    trial: int
    value: float
    step: int
    over_untuned: PairedDifference | None = None  # how much better than the untuned model, where known


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Nothing can start; says why, for example who holds a device until when."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One line for the user."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceGiven:
    """Something was noticed while a trial was running; reported once per cause."""

    trial: int
    cause: str
    message: str


StudyEvent = (
    StudyOpened
    | UntunedScored
    | TrialStarted
    | TrialMeasured
    | TrialForecast
    | TrialEnded
    | NewBest
    | Waiting
    | Note
    | AdviceGiven
)
Observer = Callable[[StudyEvent], None]
