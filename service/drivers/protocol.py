"""What the loop asks of those who run items; the same conformance tests cover every implementation."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autosft.service.decide.outcomes import Ended
from autosft.service.values import Device, Item


class Life(enum.Enum):
    """What is known of a driver that has not ended."""

    ALIVE = "alive"
    UNCLAIMED = "unclaimed"  #: it was started and has not claimed its item yet
    NONE = "none"  #: nobody has been started here for this launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an item is."""

    share: float  # 0..1
    ends_at: float | None = None  # UNIX seconds; None: not known


class Drivers(Protocol):
    """Starts and watches the processes that run items.

    Only the process that claims `item.launch` in the queue runs the item, so that a start that is carried
    out twice, or late, runs nothing twice.
    """

    def start(self, item: Item, devices: Sequence[Device]) -> None:
        """Start the driver of a booked item, which claims it.  Raises OSError if it cannot be started."""

    def poll(self, item: Item, *, now: float) -> Life | Ended:
        """Return what has become of a placed item's driver, also of one that another server has started."""

    def stop(self, item: Item) -> None:
        """Ask a driver to save its checkpoints and end; asking again has no effect."""

    def kill(self, item: Item) -> None:
        """End a driver and everything that it has started, at once."""

    def progress(self, item: Item, *, now: float) -> Progress | None:
        """Return how far an item is, None if that is not known."""
