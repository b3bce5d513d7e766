"""The study database: what was asked, what happened, what is there to go on with.

The only module that the upper layers use to reach the database.  Our tables are the only truth; Optuna's
tables in the same database are a projection of them for its dashboard (`autosft.studies.projection`).

Order of use:

    records = open_records(url)                      # UserError for a wrong or broken database
    study = records.open_study(spec, now=now)        # made, or gone on with
    study.take_over(Driver.current(), now=now)       # the only writer from here on; call heartbeat() often
    study.recover(now=now)                           # attempts of a dead driver are abandoned
    trial = study.ask(now=now)                       # enqueued ones first, then the sampler
    attempt = study.begin_attempt(trial.number, plan=plan, device_uuids=uuids, now=now)
    study.record(measurement, now=now)               # False: the attempt is over, the report was refused
    study.end_attempt(end, TrialState.COMPLETED, now=now)
    study.release(now=now)
"""

from __future__ import annotations

import enum
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autosft.profiles.errors import UserError
from autosft.studies.space import FixedSettings, Parameters, SearchSpace, Value
from autosft.studies.trial import (
    AttemptEnd,
    ExecutionPlan,
    Measurement,
    PinnedSettings,
    TrialRecord,
    TrialState,
)


class Direction(enum.Enum):
    """Which values of the metric are better."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """What a study is about.  Two runs with the same name have to agree on all but the last three."""

    name: str  # 1 to 200 characters, stored as they are; `checkpoints.slug(name)` for files
    metric: str  # e.g. "eval_loss"
    direction: Direction
    model: str  # folder or hub id, for people
    model_fingerprint: str
    data: str  # as the user wrote it, for people
    data_fingerprint: str
    pinned: PinnedSettings
    fixed: FixedSettings
    space: SearchSpace
    seed: int
    num_trials: int
    environment: Mapping[str, Any]  # hardware, versions, git state; anything JSON can hold
    output_dir: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The process that runs a study."""

    host: str
    pid: int
    pid_started_at: float  # UNIX seconds; tells a reused pid from the same process

    @classmethod
    def current(cls) -> Driver:
        import psutil

        pid = os.getpid()
        return cls(host=socket.gethostname(), pid=pid, pid_started_at=psutil.Process(pid).create_time())


class StudyInUseError(UserError):
    """Another live process runs this study."""


class LeaseLostError(UserError):
    """Another process took this study over while this one did not send a heartbeat."""


class CommandKind(enum.Enum):
    """What a user may ask of a study that is running in another process."""

    STOP = "stop"  #: end the study (no trial) or one trial, keeping everything
    PAUSE = "pause"  #: stop giving devices to trials, or to one trial
    RESUME = "resume"  #: take back a pause
    ENQUEUE = "enqueue"  #: try these parameters next


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A user's wish, waiting for the driver."""

    id: int
    kind: CommandKind
    trial: int | None  # None: the whole study
    parameters: tuple[tuple[str, Value], ...]  # for ENQUEUE
    requested_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint folder that is on disk, or was."""

    trial: int
    attempt: int
    step: int
    evaluation: int | None
    value: float | None  # the study's metric at this step
    path: str
    num_bytes: int
    sha256: str  # of its manifest
    has_resume_state: bool
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryObservation:
    """A measured peak beside what was predicted for it, kept over all studies for the memory model."""

    study: str
    trial: int
    attempt: int
    model_fingerprint: str
    device_name: str
    features: Mapping[str, Any]  # what the memory model keys on: recipe, micro batch, lengths, versions
    predicted_bytes: int  # median of the estimate
    upper_bytes: int
    measured_allocated_bytes: int | None
    measured_reserved_bytes: int | None
    out_of_memory: bool
    cap_bytes: int | None
    recorded_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOverview:
    """One line of `autosft studies list`."""

    spec: StudySpec
    num_by_state: Mapping[TrialState, int]
    best_value: float | None
    created_at: float
    driver: Driver | None  # who runs it, or ran it last without releasing it
    heartbeat_at: float | None


def default_storage_url() -> str:
    """Return the URL of the SQLite file in the user's data folder."""
    raise NotImplementedError


def open_records(url: str) -> Records:
    """Open the study database at `url` (sqlite:///FILE or postgresql://…), making or upgrading it.

    Before an upgrade a SQLite file is copied beside itself.  Raises UserError for a URL that is wrong, a
    folder that is missing, a file that is read-only, corrupt or not ours, and a schema newer than this
    version knows; MissingExtraError where PostgreSQL's driver is not installed.
    """
    raise NotImplementedError


class Records:
    """An open study database."""

    url: str

    def close(self) -> None: ...

    def open_study(self, spec: StudySpec, *, now: float) -> StudyRecords:
        """Make the study, or go on with it where its name exists.

        Raises UserError that lists what differs where the name stands for another model, data, metric,
        evaluation, search space or seed.
        """
        raise NotImplementedError

    def find_study(self, name: str) -> StudySpec | None:
        """Return what a stored study is about.  To go on with one, take its `space` from here."""
        raise NotImplementedError

    def read_study(self, name: str) -> StudyRecords:
        """Return a stored study for reading; UserError with the nearest names where there is none."""
        raise NotImplementedError

    def studies(self) -> tuple[StudyOverview, ...]:
        """Return all studies, the newest first."""
        raise NotImplementedError

    def send_command(
        self,
        study: str,
        kind: CommandKind,
        *,
        trial: int | None = None,
        parameters: Parameters | None = None,
        now: float,
    ) -> int:
        """Leave a command for the process that runs `study`; returns its id."""
        raise NotImplementedError

    def add_memory_observation(self, observation: MemoryObservation) -> None:
        """Keep a measured peak; the same study, trial and attempt a second time changes nothing."""
        raise NotImplementedError

    def memory_observations(self) -> tuple[MemoryObservation, ...]:
        """Return the observations of all studies, oldest first."""
        raise NotImplementedError


class StudyRecords:
    """One study's records, held in memory and written through.

    Reading needs nothing; every method that writes needs the lease (`take_over`) and raises
    LeaseLostError once another process holds it.  Each transition is one transaction; a process killed
    anywhere leaves either all of it or nothing.
    """

    spec: StudySpec

    def take_over(self, driver: Driver, *, now: float) -> None:
        """Become the only writer.

        Raises StudyInUseError that says who and since when, unless the last driver released the study,
        is a dead process of this host, or has sent no heartbeat for 60 s.
        """
        raise NotImplementedError

    def heartbeat(self, *, now: float) -> None:
        """Say that this driver lives; at least every 20 s.  Raises LeaseLostError."""
        raise NotImplementedError

    def release(self, *, now: float) -> None:
        """Give the lease back; harmless without one."""
        raise NotImplementedError

    def recover(self, *, now: float) -> tuple[int, ...]:
        """Abandon the attempts that a dead driver left: RUNNING trials wait again; return their numbers.

        Also brings Optuna's tables up to date, where trials that we have no row of are closed as FAIL.
        """
        raise NotImplementedError

    def ask(self, *, now: float) -> TrialRecord:
        """Return a new WAITING trial: the first enqueued one, else what the sampler proposes."""
        raise NotImplementedError

    def enqueue(self, parameters: Parameters, *, origin: str, now: float) -> bool:
        """Have `parameters` (completed from the defaults) asked before the sampler's.

        False, and nothing changes, where the same parameters were asked or enqueued before.  Raises
        UserError for names or values outside the space.  Fine at any time: going on with a study whose
        default and neighbours were enqueued already, a second call adds nothing.
        """
        raise NotImplementedError

    def begin_attempt(
        self, trial: int, *, plan: ExecutionPlan, device_uuids: tuple[str, ...], now: float
    ) -> int:
        """Set a WAITING or PAUSED trial RUNNING; return its attempt number, from 1."""
        raise NotImplementedError

    def record(self, measurement: Measurement, *, now: float) -> bool:
        """Keep a report; False, and nothing changes, where its attempt is not the running one.

        The same report twice counts once.
        """
        raise NotImplementedError

    def end_attempt(
        self, end: AttemptEnd, state: TrialState, *, value: float | None = None, now: float
    ) -> bool:
        """End the running attempt and set its trial's next state; False where the attempt is over.

        `state` is what the tuning loop decided: over (COMPLETED, STOPPED, INFEASIBLE, FAILED), PAUSED, or
        WAITING to be tried again.  `value` is the study's metric; the best evaluation's where not given,
        and the worst possible one for a non-finite loss.
        """
        raise NotImplementedError

    def set_state(self, trial: int, state: TrialState, *, message: str = "", now: float) -> None:
        """Change the state of a trial that is not running: INFEASIBLE before any attempt, STOPPED by the user,
        PAUSED to WAITING.
        """
        raise NotImplementedError

    def trials(self) -> tuple[TrialRecord, ...]:
        """Return all trials by number."""
        raise NotImplementedError

    def trial(self, number: int) -> TrialRecord:
        raise NotImplementedError

    def unfinished(self) -> tuple[TrialRecord, ...]:
        """Return the trials that are not over, by number."""
        raise NotImplementedError

    def num_finished(self) -> int:
        """Count completed, stopped and infeasible trials."""
        raise NotImplementedError

    def progress(self, number: int) -> tuple[Measurement, ...]:
        """Return every report of a trial, by attempt and step; read from the database."""
        raise NotImplementedError

    def pending_commands(self) -> tuple[Command, ...]:
        """Return the commands of users that are not done, oldest first; read from the database."""
        raise NotImplementedError

    def finish_command(self, command_id: int, *, now: float) -> None:
        """Mark a command done."""
        raise NotImplementedError

    def add_checkpoint(self, checkpoint: CheckpointRecord) -> None:
        """Keep the record of a checkpoint that is in place; the same path again replaces it."""
        raise NotImplementedError

    def remove_checkpoint(self, path: str, *, now: float) -> None:
        """Mark a checkpoint as removed; call it before the folder is deleted."""
        raise NotImplementedError

    def checkpoints(self) -> tuple[CheckpointRecord, ...]:
        """Return the checkpoints that are not removed, by trial and step."""
        raise NotImplementedError
