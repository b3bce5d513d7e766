"""Values that the study database stores next to the trials.  Frozen, without behaviour."""

from __future__ import annotations

import enum
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError
from autosft.studies.search.dimensions import Value
from autosft.studies.search.space import FixedSettings, SearchSpace
from autosft.studies.trial import ExecutionPlan, PinnedSettings, TrainingSettings, TrialState


class Direction(enum.Enum):
    """Which values of the metric are better."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """What identifies a study, and how it is run.

    Two runs under one name have to agree on everything that decides what a score means: metric, model, data,
    pinned and fixed settings, search space and seed.
    """

    name: str  # 1 to 200 characters, stored unchanged; `checkpoints.slug(name)` in file names
    metric: str  # e.g. "eval_loss"
    direction: Direction
    model: str  # folder or hub id, for display
    model_fingerprint: str
    data: str  # as the user wrote it, for display
    data_fingerprint: str
    pinned: PinnedSettings
    fixed: FixedSettings
    space: SearchSpace
    seed: int
    num_trials: int  # requested; may differ from run to run
    environment: Any  # hardware, versions, git state; any JSON value
    output_dir: str = ""
    data_options: Any = None  # how the data was prepared: keyword arguments of `profiles.dataset.prepare`
    trust_remote_code: bool = False
    store_url: str = ""  # where this study's checkpoints are stored; "" for a local folder


@dataclass(frozen=True, slots=True, kw_only=True)
class UntunedScore:
    """What the model measured before any tuning, on the examples that trials are compared on."""

    metrics: tuple[tuple[str, float], ...]
    duration_s: float  # of evaluating it
    recorded_at: float  # UNIX seconds

    def metric(self, name: str) -> float | None:
        return dict(self.metrics).get(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The process that runs a study."""

    host: str
    pid: int
    pid_started_at: float  # UNIX seconds; detects that the pid was reused by another process
    boot_id: str = ""  # of the kernel; with start_ticks it detects the same even if the clock was set
    start_ticks: int | None = None  # from boot to the start of the process; None if the system has none

    @classmethod
    def current(cls) -> Driver:
        import psutil

        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            pid=pid,
            pid_started_at=psutil.Process(pid).create_time(),
            boot_id=current_boot_id(),
            start_ticks=start_ticks(pid),
        )


def current_boot_id() -> str:
    """Return the id of this boot of the kernel, "" where there is none (Linux has one)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def start_ticks(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since the boot; None where that is not known."""
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[19])


def state_if_running(pid: int, ticks: int) -> str | None:
    """Return the state letter of the process that was started then, None where it has ended."""
    fields = _stat_fields(pid)
    if fields is None or int(fields[19]) != ticks or fields[0] in "ZX":
        return None
    return fields[0]


def _stat_fields(pid: int) -> list[str] | None:
    """Return a process's fields of proc(5) from the third, its state, on."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None


class StudyInUseError(UserError):
    """Another live process is running this study."""


class LeaseLostError(UserError):
    """Another process took over this study because this one sent no heartbeat."""


class CommandKind(enum.Enum):
    """What a user can ask a study to do that runs in another process."""

    STOP = "stop"  #: end the study (no trial given) or one trial, keeping everything
    PAUSE = "pause"  #: start no more trials, or pause one trial
    RESUME = "resume"  #: undo a pause
    ENQUEUE = "enqueue"  #: try these parameters next


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A user command, waiting for the driver."""

    id: int
    kind: CommandKind
    trial: int | None  # None: the whole study
    parameters: tuple[tuple[str, Value], ...]  # for ENQUEUE
    requested_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One attempt at a trial: where it ran, from when to when, and how it ended."""

    trial: int
    number: int  # from 1
    device_name: str
    device_uuids: tuple[str, ...]
    started_at: float  # UNIX seconds
    ended_at: float | None  # None while it runs
    outcome: str | None  # "completed", a StopReason, a FailureKind, or "abandoned" with its driver
    message: str
    log_path: str | None
    predicted_bytes: int  # the upper bound that had to be free on the device
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint folder on disk or at a URL."""

    trial: int
    attempt: int
    step: int
    evaluation: int | None
    value: float | None  # the study's metric at this step
    path: str  # or URL
    num_bytes: int  # 0 if the folder is not visible from this machine
    sha256: str  # of its manifest, "" if it has none
    has_resume_state: bool
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointScore:
    """A checkpoint's score on examples that were not used to choose it."""

    trial: int
    step: int
    examples: str  # "final": the held-out part of the study's data; otherwise the name of a data set or task
    metric: str
    value: float
    low: float | None  # 95 % interval; None if not known
    high: float | None
    num_examples: int | None
    recorded_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryObservation:
    """Measured peak and speed next to the prediction, kept across studies to calibrate both models."""

    study: str
    trial: int
    attempt: int
    model_fingerprint: str
    device_name: str
    settings: TrainingSettings
    pinned: PinnedSettings
    plan: ExecutionPlan  # with the estimate
    measured_allocated_bytes: int | None
    measured_reserved_bytes: int | None
    out_of_memory: bool  # if so, the peak is a lower bound
    recorded_at: float
    measured_tokens_per_s: float | None = None  # None if it shared its device


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOverview:
    """One line of `autosft studies list`."""

    spec: StudySpec
    num_by_state: Mapping[TrialState, int]
    best_value: float | None
    created_at: float
    driver: Driver | None  # the process that runs it, or that last ran it without releasing it
    heartbeat_at: float | None
