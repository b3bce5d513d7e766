"""What the service's queue holds.  Frozen values, without clock and without files.

Times are UNIX seconds.  An *item* is one command of autosft that was submitted; it runs as a process of its
own, its *driver*.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from autosft.studies.values import Driver


class ItemState(enum.Enum):
    """Where an item is.  `WAITING` and `PREEMPTED` are in the queue; `ENDED_STATES` are final."""

    WAITING = "waiting"  #: in the queue; has not run yet, or its driver was lost
    PREEMPTED = "preempted"  #: in the queue; goes on from its checkpoints with the same command
    HELD = "held"  #: not in the queue until somebody releases it; `note` says why
    STARTING = (
        "starting"  #: devices are booked and `launch` is recorded; its driver has not said that it runs
    )
    RUNNING = "running"  #: its driver runs
    STOPPING = "stopping"  #: its driver was asked to stop; `then` is the state that follows
    DONE = "done"
    FAILED = "failed"  #: its driver ended with an error, told in `note`
    CANCELLED = "cancelled"
    REFUSED = "refused"  #: fits nowhere; `note` says what would


#: In the queue.
QUEUED_STATES = frozenset({ItemState.WAITING, ItemState.PREEMPTED})
#: Devices are booked.
PLACED_STATES = frozenset({ItemState.STARTING, ItemState.RUNNING, ItemState.STOPPING})
#: Final.
ENDED_STATES = frozenset({ItemState.DONE, ItemState.FAILED, ItemState.CANCELLED, ItemState.REFUSED})
#: Everything else: what a decision may have to look at.
OPEN_STATES = frozenset(ItemState) - ENDED_STATES


_QUEUED, _PLACED = tuple(QUEUED_STATES), tuple(PLACED_STATES)


class Role(enum.Enum):
    """What a user may see and stop."""

    OWNER = "owner"  #: their own items
    ADMIN = "admin"  #: all items


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """A command of autosft as it was typed: `tune`, `train` or `evaluate` with its flags."""

    command: str
    positional: tuple[str, ...] = ()
    flags: tuple[tuple[str, str], ...] = ()  # ("--trials", "24"), in order; ("--no-prune", "") takes no value

    def to_argv(self) -> tuple[str, ...]:
        """Return the command line after `autosft`; a value never reads as a flag."""
        flags = [f"{name}={value}" if value else name for name, value in self.flags]
        return self.command, *flags, *(["--", *self.positional] if self.positional else [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run an item: how many devices of a kind, how much of each, for how long.

    An item that can use more devices at once, such as a study of many trials, has a way for each number.
    """

    kind: str  # `Device.kind`
    width: int  # devices, all at once
    bytes_each: int  # upper bound on each, including the context
    seconds: float  # of the whole item, alone on its devices
    seconds_low: float
    seconds_high: float
    load: float = 1.0  # share of the device's time: `scheduler.decide.sharing`
    may_share: bool = False  # beside other items, where those may, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What an item needs; never without a way."""

    ways: tuple[Way, ...]
    is_predicted: bool = True  # False: stated by the user, or assumed

    @property
    def narrowest(self) -> Way:
        """The way with the fewest devices; of those, the fastest."""
        if len(self.ways) == 1:  # as of most; a decision asks this hundreds of times
            return self.ways[0]
        return min(self.ways, key=lambda way: (way.width, way.seconds, way.bytes_each, way.kind))


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Devices that are booked for an item."""

    way: int  # position in its demand's ways
    device_uuids: tuple[str, ...]
    bytes_each: int
    rate: float  # device-seconds that its owner is charged for each second


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What is put into the queue."""

    name: str  # of its study, or of what it trains or evaluates
    owner: str
    arguments: Arguments
    demand: Demand | None = None  # None: not planned yet; it is not placed before
    priority: int = 0  # highest first
    not_before: float | None = None
    after: tuple[int, ...] = ()  # items that have to be done before
    may_share: bool = True  # beside items of others
    is_held: bool = False
    refusal: str = ""  # fits nowhere, with what would fit: it is recorded as refused
    cloned_from: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One row of the queue."""

    id: int  # in order of submission
    name: str
    owner: str
    arguments: Arguments
    state: ItemState
    submitted_at: float
    queued_at: float  # since when it waits, or last waited: for ageing
    demand: Demand | None = None
    priority: int = 0
    rank: int | None = None  # given by an admin's `move`: lowest first, before all without one
    not_before: float | None = None
    after: tuple[int, ...] = ()
    may_share: bool = True
    cloned_from: int | None = None
    note: str = ""  # why it is held, failed or refused; what it waits for in the environment
    place: Place | None = None  # while it is placed
    launch: str = ""  # unique to one start: only the driver that claims it runs
    process: Driver | None = None  # while it runs
    then: ItemState | None = None  # what follows STOPPING: PREEMPTED, HELD, CANCELLED or WAITING
    started_at: float | None = None  # of its present or last start
    ended_at: float | None = None
    num_starts: int = 0
    num_lost: int = 0  # starts in a row whose driver vanished without progress
    progress: float = 0.0  # 0..1, measured by its records
    ends_at: float | None = None  # predicted at its start, and by its driver while it runs
    device_s: float = 0.0  # seconds of devices used, over all starts
    charged_until: float | None = None  # while it runs: to where `device_s` and its owner's usage go

    # A decision asks this of thousands of items: tuples compare by identity, sets call the enum's hash.
    @property
    def is_queued(self) -> bool:
        return self.state in _QUEUED

    @property
    def is_placed(self) -> bool:
        return self.state in _PLACED

    @property
    def is_ended(self) -> bool:
        return self.state in ENDED_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device that the service hands out."""

    uuid: str
    kind: str  # devices of one kind take the same ways
    name: str
    node: str
    index: int
    total_bytes: int
    usable_bytes: int  # what other programs leave, ours counted as usable
    max_items: int = 8  # that may share it
    overhead: float = 1.0  # of sharing: `scheduler.decide.sharing`
    link_bytes_per_s: float | None = None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it is another node's of a cluster."""
        return is_elsewhere(self.node)


def is_elsewhere(node: str) -> bool:
    """Whether a node is not the server's machine: `scheduler.cluster.nodes` names others HOST/NODE."""
    return "/" in node


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Somebody with a token."""

    name: str
    role: Role = Role.OWNER
    shares: float = 1.0  # of the devices' time, against those of others
    max_devices: int | None = None  # at once
    device_hours_a_week: float | None = None
    is_revoked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a user has used."""

    decayed_s: float = 0.0  # device-seconds, halved with each half-life
    week_s: float = 0.0  # device-seconds of the last seven days


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How far a running item is."""

    item: int
    launch: str  # of the start that this is about
    progress: float  # 0..1, measured
    ends_at: float | None  # predicted; None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One transition of an item."""

    id: int
    item: int
    at: float
    state: ItemState
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A decision: this item starts there."""

    item: int
    place: Place
    ends_at: float  # predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why an item waits, and when it is predicted to start and end; None where nobody knows."""

    text: str
    starts_at: float | None = None
    ends_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is to be done now, and what has to wait."""

    starts: tuple[Start, ...] = ()
    preempts: tuple[int, ...] = ()  # running items that give way
    is_whole: bool = True  # False: more may start at once
