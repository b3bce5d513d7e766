"""Values that the tests of the service share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from autosft.service.decide.situation import Situation
from autosft.service.values import (
    Arguments,
    Demand,
    Device,
    Item,
    ItemState,
    Place,
    Submission,
    Way,
)
from autosft.studies.values import Driver

GIB = 1 << 30
NOW = 1_000_000.0


def submission(name: str = "study", owner: str = "ann", **changes: Any) -> Submission:
    arguments = Arguments(command="tune", flags=(("--study", name),))
    return dataclasses.replace(Submission(name=name, owner=owner, arguments=arguments), **changes)


def way(width: int = 1, gib: float = 10, seconds: float = 3600.0, **changes: Any) -> Way:
    made = Way(
        kind="gpu",
        width=width,
        bytes_each=int(gib * GIB),
        seconds=seconds,
        seconds_low=seconds / 2,
        seconds_high=seconds * 2,
    )
    return dataclasses.replace(made, **changes)


def demand(*ways: Way) -> Demand:
    return Demand(ways=ways or (way(),))


def place(*uuids: str, rate: float | None = None) -> Place:
    found = uuids or ("gpu-0",)
    return Place(
        way=0, device_uuids=found, bytes_each=10 * GIB, rate=float(len(found)) if rate is None else rate
    )


def device(number: int = 0, gib: float = 80, node: str = "node", **changes: Any) -> Device:
    made = Device(
        uuid=f"gpu-{number}",
        kind="gpu",
        name="GPU",
        node=node,
        index=number,
        total_bytes=int(gib * GIB),
        usable_bytes=int(gib * GIB),
    )
    return dataclasses.replace(made, **changes)


def process(number: int = 1) -> Driver:
    """A process on another host: alive until its heartbeat is old."""
    return Driver(host=f"host-{number}", pid=number, pid_started_at=0.0)


def item(item_id: int, *ways: Way, **changes: Any) -> Item:
    """An item that waits."""
    made = Item(
        id=item_id,
        name=f"study-{item_id}",
        owner="ann",
        arguments=Arguments(command="tune"),
        state=ItemState.WAITING,
        submitted_at=NOW,
        queued_at=NOW,
        demand=demand(*ways),
    )
    return dataclasses.replace(made, **changes)


def runs(item_id: int, *on: int, until: float = NOW + 600, **changes: Any) -> Item:
    """An item that runs on these devices."""
    width = max(1, len(on))
    made = item(
        item_id,
        way(width, seconds=3600.0),
        state=ItemState.RUNNING,
        place=place(*(f"gpu-{number}" for number in on)),
        started_at=NOW - 600,
        ends_at=until,
        launch=f"launch-{item_id}",
    )
    return dataclasses.replace(made, **changes)


def situation(items: Sequence[Item], devices: Sequence[Device] | int = 1, **changes: Any) -> Situation:
    found = [device(number) for number in range(devices)] if isinstance(devices, int) else devices
    made = Situation(now=NOW, items=tuple(items), devices=tuple(found))
    return dataclasses.replace(made, **changes)
