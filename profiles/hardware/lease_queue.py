"""Queue the processes that wait for a device, first come, first served.

A process that was refused a lease keeps a small file next to the leases while it retries.  Meanwhile, leases
of processes that came later are refused, or a large trial would starve while a study starts one small trial
after the other.  It blocks nobody if programs other than autosft use what it needs, or if it has stopped
retrying.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from autosft.profiles.hardware.locked_files import LockedFile, live

SUFFIX = ".waiting"

#: A process that has not retried for this long no longer waits.
STALE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A process that waits for memory of a device."""

    num_bytes: int
    pid: int
    study: str
    arrived_at: float  # UNIX seconds
    asked_at: float  # of its last attempt


class Places:
    """The positions of this process in the queues of devices."""

    def __init__(self) -> None:
        self._files: dict[Path, LockedFile] = {}

    def take(self, folder: Path, waiter: Waiter) -> None:
        """Enter the queue, or refresh the existing position; call inside the critical section."""
        place = self._files.get(folder)
        if place is not None and place.is_held and place.path.exists():
            place.write(asdict(waiter))
            return
        place = self._files[folder] = LockedFile(folder, SUFFIX)
        try:
            place.publish(asdict(waiter))
        except OSError:  # such as a full disk
            self.leave(folder)
            raise

    def leave(self, folder: Path) -> None:
        """Leave the queue; has no effect outside of it."""
        if (place := self._files.pop(folder, None)) is not None:
            place.release()

    def leave_all(self) -> None:
        """Leave all queues."""
        for folder in list(self._files):
            self.leave(folder)


def waiting(folder: Path, *, now: float) -> list[Waiter]:
    """Return who waits for a device, in order; call inside the critical section."""
    found = []
    for values in live(folder, SUFFIX):
        try:
            waiter = Waiter(
                num_bytes=int(values["num_bytes"]),
                pid=int(values["pid"]),
                study=str(values["study"]),
                arrived_at=float(values["arrived_at"]),
                asked_at=float(values["asked_at"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError):  # a later version's: ignored
            continue
        if abs(now - waiter.asked_at) <= STALE_S:
            found.append(waiter)
    return sorted(found, key=lambda waiter: (waiter.arrived_at, waiter.pid))


def ahead_of(
    waiters: Iterable[Waiter], *, arrived_at: float, pid: int, for_autosft_bytes: int
) -> list[Waiter]:
    """Return the waiters of other processes that come before one with this time of arrival.

    `for_autosft_bytes` is what other programs leave of the device: whoever needs more waits for them, and
    blocks nobody.
    """
    return [
        waiter
        for waiter in waiters
        if waiter.pid != pid
        and (waiter.arrived_at, waiter.pid) < (arrived_at, pid)
        and waiter.num_bytes <= for_autosft_bytes
    ]


def describe_ahead(waiters: Iterable[Waiter]) -> str:
    """Describe who is served first, such as "Study 'chat' (process 4711) has waited longer, since 14:05."."""
    return " ".join(
        f"Study {waiter.study!r} (process {waiter.pid}) has waited longer, since "
        f"{datetime.datetime.fromtimestamp(waiter.arrived_at).astimezone():%H:%M}."
        for waiter in waiters
    )
