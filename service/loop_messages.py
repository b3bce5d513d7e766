"""What the server's two processes tell each other: one answers requests, the other looks at the queue.

Both are ours and of one version, so values travel pickled, through the pipes that the one was started with.
The end of its input is the end of the scheduler's process: it never outlives the one that started it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autosft.profiles.errors import UserError
from autosft.service.board import Change


class Command(enum.Enum):
    """What the scheduler's process is told, a line each."""

    WAKE = "wake"  #: something was submitted or changed: look at the queue
    DRAIN = "drain"  #: start nothing more
    KEEP = "keep"  #: end; what runs goes on
    CHECKPOINT = "checkpoint"  #: have what runs save a checkpoint and stop, then end


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictured:
    """The picture has changed; the first one says that this process is the queue's server now."""

    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTold:
    """Something has happened to a trial."""

    owner: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """It cannot serve the queue, or not any more."""

    error: UserError  # ServedElsewhereError where another server is the queue's


Message = Pictured | TrialTold | Refused
