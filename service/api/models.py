"""What requests and answers hold, as OpenAPI describes it.  Times are UNIX seconds, sizes bytes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: Within SQLite's and PostgreSQL's integers.
Id = Annotated[int, Field(ge=1, le=2**31 - 1)]
Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]
TrialNumber = Annotated[int, Field(ge=0, le=10_000_000)]
Action = Literal["pause", "resume", "stop"]
Priority = Annotated[int, Field(ge=-1000, le=1000)]
Value = str | int | float | bool | list[str | int | float | bool] | None


class Asked(BaseModel):
    """A body; what it does not know it refuses."""

    model_config = ConfigDict(extra="forbid")


class Submitted(Asked):
    """One command to queue."""

    command: Literal["tune", "train", "evaluate"] = "tune"
    arguments: dict[Annotated[str, Field(max_length=100)], Value] = Field(
        default_factory=dict,
        max_length=200,
        description="The command's flags by name (`learning_rate`), as on the command line; for evaluate, "
        "`given_models` are its models.",
        examples=[{"model": "llama", "data": "chats.jsonl", "trials": 24, "learning_rate": "1e-5..1e-3 log"}],
    )
    configuration: str | None = Field(
        None, max_length=1 << 20, description="For train: the content of a best.yaml."
    )
    name: str | None = Field(None, max_length=100, description="Of the study; by default one is made.")
    priority: Priority = Field(0, description="Highest first; above 0 for admins alone.")
    after: list[Id] = Field(default_factory=list, max_length=100, description="Items to be done before.")
    not_before: Time | None = Field(None, description="When it may start at the earliest.")
    may_share: bool = Field(True, description="Whether it may share a device with items of others.")
    hold: bool = Field(False, description="Whether it is held until it is released.")


class Changed(Asked):
    """What a clone has instead of what the original has; null removes a flag."""

    arguments: dict[Annotated[str, Field(max_length=100)], Value] = Field(
        default_factory=dict, max_length=200
    )
    name: str | None = Field(None, max_length=100)
    warm_start: bool = Field(False, description="Try the original study's best settings first.")
    priority: Priority = 0
    hold: bool = False


class Prioritized(Asked):
    priority: Priority


class Moved(Asked):
    place: int = Field(1, ge=1, le=100_000, description="The place in the queue, from 1.")


class Token(Asked):
    token: str = Field(min_length=1, max_length=200)


class Noted(Asked):
    note: str = Field("", max_length=500)


class Enqueued(Asked):
    """A trial that a study tries next; the other settings are those of its default configuration."""

    settings: dict[Annotated[str, Field(max_length=100)], str | int | float | bool] = Field(
        min_length=1, max_length=50, examples=[{"learning_rate": 3e-4}]
    )


class Predicted(BaseModel):
    """What an item is predicted to need, on the fewest devices of the first kind that it fits."""

    device_kind: str
    num_devices: int
    bytes_each: int
    seconds: float
    seconds_low: float
    seconds_high: float
    is_predicted: bool  # False: stated or assumed


class Shown(BaseModel):
    """An item of the queue."""

    id: int
    name: str
    command: str
    command_line: str
    owner: str
    state: str
    place: int | None  # in the queue, from 1
    priority: int
    reason: str  # why it waits
    note: str  # why it is held, failed or refused
    is_planning: bool  # what it needs is not predicted yet
    predicted: Predicted | None
    predicted_start: float | None
    predicted_end: float | None
    submitted_at: float
    not_before: float | None
    after: list[int]
    started_at: float | None
    ended_at: float | None
    progress: float  # measured, 0 to 1
    devices: list[str]
    device_seconds: float  # measured, over all starts
    num_starts: int
    cloned_from: int | None


class Listed(BaseModel):
    items: list[Shown]
    total: int
    at: float


class Memory(BaseModel):
    item: int
    name: str
    num_bytes: int


class ShownDevice(BaseModel):
    uuid: str
    name: str
    node: str
    index: int
    total_bytes: int
    predicted: list[Memory]  # upper bounds that are booked
    measured: list[Memory]
    others_bytes: int
    free_bytes: int
    is_measured: bool = Field(description="False for other nodes of a cluster: seen when they joined.")


class Devices(BaseModel):
    devices: list[ShownDevice]
    at: float


class ShownTrial(BaseModel):
    number: int
    state: str
    value: float | None
    step: int | None
    num_attempts: int
    origin: str
    settings: dict[str, Any]
    message: str


class Trials(BaseModel):
    study: str
    metric: str
    direction: str
    num_trials: int
    trials: list[ShownTrial]


class Sent(BaseModel):
    """A command that the process that runs the study carries out."""

    id: int
    is_running: bool  # False: it is carried out when the study runs again


class Log(BaseModel):
    text: str
    offset: int  # where the next part begins
    is_complete: bool  # whether its writer has ended


class Artifact(BaseModel):
    path: str
    num_bytes: int
    changed_at: float


class Artifacts(BaseModel):
    folder: str
    files: list[Artifact]
    is_complete: bool  # False: there are more than are listed


class Problem(BaseModel):
    """Why a request was refused, and what helps."""

    error: str
    remedy: str | None = None


class Health(BaseModel):
    status: Literal["ok", "not ready"]
    reasons: list[str] = []


class Me(BaseModel):
    name: str
    role: str
