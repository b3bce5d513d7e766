"""Leases of device memory, across all autosft processes of one user on one machine.

Before a trial starts, its bytes (and CPU threads) are leased; a lease is a small file that the holder keeps
locked (`locked_files`).  Leases keep autosft processes from booking the same bytes twice; what other programs
use shows in the device's free memory.  Waiting processes are served in order of arrival (`lease_queue`).
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autosft.profiles.errors import UserError
from autosft.profiles.hardware.lease_queue import Places, Waiter, ahead_of, waiting
from autosft.profiles.hardware.locked_files import LockedFile, critical_section, live
from autosft.profiles.units import gib


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseInfo:
    """A holder and how much of a device it has leased."""

    device_uuid: str
    num_bytes: int
    num_cores: int  # CPU threads; 0 on a GPU
    pid: int  # of the holder: the process whose death frees the lease
    study: str
    trial: int
    ends_at: float | None  # predicted, UNIX seconds; None: not known
    outside_bytes: int  # in use by other programs when it was granted, estimated


class Lease:
    """A lease that this process holds until `release` or its death; a context manager."""

    def __init__(self, info: LeaseInfo, file: LockedFile) -> None:
        self.info = info
        self._file = file

    def update(self, *, ends_at: float) -> None:
        """Publish a new predicted end."""
        assert self._file.is_held, "the lease was released"
        self.info = replace(self.info, ends_at=ends_at)
        with contextlib.suppress(OSError), critical_section(self._file.path.parent):  # others learn it later
            self._file.write(asdict(self.info))

    def release(self) -> None:
        """Release the bytes; calling it again has no effect."""
        self._file.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class Leases:
    """The leases of this machine; all objects on the same folder see the same leases."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder if folder is not None else default_folder()
        self._places = Places()

    def acquire(
        self,
        device_uuid: str,
        num_bytes: int,
        *,
        total_bytes: int,
        free_bytes: int,
        study: str,
        trial: int,
        ends_at: float | None = None,
        num_cores: int = 0,
        total_cores: int = 0,
        arrived_at: float | None = None,
    ) -> Lease | None:
        """Lease bytes of a device; return None when they do not fit next to what is leased or in use.

        `total_bytes` and `free_bytes` are the device's, read just now.  A lease is granted when it fits in
        the free memory and all live leases together fit in what other programs leave.  What other programs
        use is known exactly while there is no live lease; otherwise it is the largest figure recorded by a
        live lease, or the used memory that exceeds all leased bytes if that is more: a program that started
        later is only seen from there on.  Cores add up to at most `total_cores`.

        Whoever waits longer is served first (`lease_queue`).  `arrived_at` (UNIX seconds) is since when the
        caller has asked for this: with it, a refusal keeps its place in the queue until it is granted or has
        not asked for a while.  Without it the caller comes last, and keeps no place.

        Raises UserError when the leases' folder cannot be used.
        """
        assert num_bytes >= 0, num_bytes
        assert num_cores >= 0, num_cores
        with self._device(device_uuid) as folder:
            live = _live_leases(folder)
            outside_bytes = _outside_bytes(live, used_bytes=max(0, total_bytes - free_bytes))
            now = time.time()
            ahead = ahead_of(
                waiting(folder, now=now),
                arrived_at=now if arrived_at is None else arrived_at,
                pid=os.getpid(),
                for_autosft_bytes=total_bytes - outside_bytes,
            )
            has_bytes = num_bytes <= _left_bytes(live, total_bytes=total_bytes, free_bytes=free_bytes)
            num_leased_cores = sum(info.num_cores for info in live)
            has_cores = not num_cores or num_leased_cores + num_cores <= total_cores
            if ahead or not (has_bytes and has_cores):
                if arrived_at is not None:
                    waiter = Waiter(
                        num_bytes=num_bytes, pid=os.getpid(), study=study, arrived_at=arrived_at, asked_at=now
                    )
                    self._places.take(folder, waiter)
                return None
            self._places.leave(folder)
            info = LeaseInfo(
                device_uuid=device_uuid,
                num_bytes=num_bytes,
                num_cores=num_cores,
                pid=os.getpid(),
                study=study,
                trial=trial,
                ends_at=ends_at,
                outside_bytes=outside_bytes,
            )
            lease = Lease(info, file := LockedFile(folder, _SUFFIX))
            try:
                file.publish(asdict(info))
            except OSError:  # such as a full disk
                lease.release()
                raise
        return lease

    def available_bytes(self, device_uuid: str, *, total_bytes: int, free_bytes: int) -> int:
        """Return the most bytes of a device that `acquire` would grant at this moment, 0 for none."""
        with self._device(device_uuid) as folder:
            live = _live_leases(folder)
        return max(0, _left_bytes(live, total_bytes=total_bytes, free_bytes=free_bytes))

    def held(self, device_uuid: str) -> list[LeaseInfo]:
        """Return the live leases of a device, the first to end first; removes dead ones."""
        with self._device(device_uuid) as folder:
            live = _live_leases(folder)
        return sorted(
            live, key=lambda info: (info.ends_at is None, info.ends_at or 0.0, info.pid, info.trial)
        )

    def ahead(self, device_uuid: str, *, arrived_at: float) -> list[Waiter]:
        """Return who waits for a device longer than a caller who arrived then, the first at the front."""
        with self._device(device_uuid) as folder:
            found = waiting(folder, now=time.time())
        return [waiter for waiter in found if waiter.pid != os.getpid() and waiter.arrived_at < arrived_at]

    def leave_queues(self) -> None:
        """Give up every place that a refusal has kept."""
        self._places.leave_all()

    @contextlib.contextmanager
    def _device(self, device_uuid: str) -> Iterator[Path]:
        """Enter the critical section of one device and yield its folder."""
        folder = self._folder / re.sub(r"[^\w.-]", "_", device_uuid)
        try:
            _make_private(self._folder)
            folder.mkdir(mode=0o700, exist_ok=True)
            with critical_section(folder):
                yield folder
        except OSError as error:
            raise UserError(
                f"Leases of devices cannot be stored in {self._folder}: {error.strerror}.",
                remedy="Make the folder writable, or free some space on its disk.",
            ) from error


def _outside_bytes(live: Sequence[LeaseInfo], *, used_bytes: int) -> int:
    """Estimate the bytes of a device in use by programs that hold no lease."""
    leased_bytes = sum(info.num_bytes for info in live)
    return max(used_bytes - leased_bytes, *(info.outside_bytes for info in live)) if live else used_bytes


def _left_bytes(live: Sequence[LeaseInfo], *, total_bytes: int, free_bytes: int) -> int:
    """Return the bytes of a device that are neither leased nor used by other programs."""
    outside_bytes = _outside_bytes(live, used_bytes=max(0, total_bytes - free_bytes))
    return min(free_bytes, total_bytes - outside_bytes - sum(info.num_bytes for info in live))


def default_folder() -> Path:
    """Return the folder of this user's leases on this machine.

    The same for all of the user's processes, so it hangs on no environment variable: a session under ssh,
    sudo or cron has none of XDG_RUNTIME_DIR and TMPDIR, or others.  Never in the home folder, which
    several machines may share.  The first of these that is not somebody else's: in a folder that all users
    write to, another one may have made ours, by mistake or to keep us from running.
    """
    if sys.platform == "win32":
        return Path(tempfile.gettempdir()) / "autosft-leases"
    folders = [base / f"autosft-leases-{os.getuid()}" for base in _SHARED]
    return next((folder for folder in folders if _may_be_ours(folder)), folders[0])


def _may_be_ours(folder: Path) -> bool:
    """Whether a folder is this user's, or can be made."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return os.access(folder.parent, os.W_OK | os.X_OK)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def describe_leases(leases: Sequence[LeaseInfo], *, now: float) -> str:
    """Describe who holds what and for how long, for a run that has to wait.

    One sentence per lease, such as "Study 'chat' (trial 3, process 4711) holds 9.8 GiB until about 14:05,
    in 12 min."
    """
    return " ".join(_describe(lease, now) for lease in leases)


def _describe(lease: LeaseInfo, now: float) -> str:
    what = gib(lease.num_bytes)
    if lease.num_cores:
        what += f" and {lease.num_cores} CPU thread{'s' if lease.num_cores > 1 else ''}"
    who = f"trial {lease.trial}" if lease.trial >= 0 else "its untuned model"
    holder = f"Study {lease.study!r} ({who}, process {lease.pid}) holds {what}"
    if lease.ends_at is None:
        return f"{holder}; when it ends is not known yet."
    if lease.ends_at < now:
        return f"{holder} and should have ended {_minutes(now - lease.ends_at)} ago."
    end = datetime.datetime.fromtimestamp(lease.ends_at).astimezone()
    return f"{holder} until about {end:%H:%M}, in {_minutes(lease.ends_at - now)}."


def _minutes(duration_s: float) -> str:
    if duration_s < 60:
        return "less than a minute"
    minutes = round(duration_s / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


_SUFFIX = ".lease"
#: Where all users may write, in the order in which they are tried.
_SHARED = tuple(map(Path, ("/tmp", "/var/tmp", "/dev/shm")))  # nosec B108 - checked by lstat


def _live_leases(folder: Path) -> list[LeaseInfo]:
    """Return the leases whose holders live and remove the others; inside the critical section."""
    return [_info_from(values) for values in live(folder, _SUFFIX)]


def _info_from(values: Mapping[str, Any]) -> LeaseInfo:
    """Read a lease, also one of another version: fields that are not known are left out.

    What is missing or of another type counts as nothing held, for which the device's free memory stands in.
    """

    def number(name: str) -> int:
        value = values.get(name)
        return value if isinstance(value, int) and value >= 0 else 0

    ends_at = values.get("ends_at")
    return LeaseInfo(
        device_uuid=str(values.get("device_uuid", "")),
        num_bytes=number("num_bytes"),
        num_cores=number("num_cores"),
        pid=number("pid"),
        study=str(values.get("study", "of another version of autosft")),
        trial=number("trial"),
        ends_at=ends_at if isinstance(ends_at, int | float) and math.isfinite(ends_at) else None,
        outside_bytes=number("outside_bytes"),
    )


def _make_private(folder: Path) -> None:
    """Make the folder; refuse one that another user made in a shared place, to read or block leases."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if sys.platform != "win32":
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PermissionError(13, "it belongs to another user, or is a link")
        if stat.S_IMODE(status.st_mode) & 0o077:
            folder.chmod(0o700)
