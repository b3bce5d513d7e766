"""Values that the tests of the service share."""

from __future__ import annotations

import dataclasses
from typing import Any

from autosft.service.values import Arguments, Demand, Device, Place, Submission, Way
from autosft.studies.values import Driver

GIB = 1 << 30


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
