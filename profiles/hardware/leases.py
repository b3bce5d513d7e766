"""Leases of device memory, across all autosft processes of one user on one machine.

Before a trial starts, its bytes (and CPU threads) are leased; a lease is a small file that the holder keeps
locked.  The kernel releases the lock when the holder dies, however it dies, so that nothing has to be cleaned
up after a SIGKILL.  Leases keep autosft processes from booking the same bytes twice; what other programs use
shows in the device's free memory.

Locks are filelock's: flock on Linux and macOS, LockFileEx on Windows (not tested there).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import stat
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import lock_descriptor

from autosft.profiles.errors import UserError
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
    """A lease that this process holds until `release` or its death; a context manager.

    A forked child does not hold it: the child's copy of the file is closed at once, or the lease would
    outlive the holder.
    """

    def __init__(self, info: LeaseInfo, path: Path, file: int) -> None:
        self.info = info
        self._path = path
        self._file = file
        _held_here.add(self)

    def publish(self) -> None:
        """Lock the file and make the lease visible; `Leases.acquire` calls it inside its critical section."""
        locked = lock_descriptor(self._file, blocking=False)
        assert locked, f"a lease that was just created is locked: {self._path}"
        self._write()

    def update(self, *, ends_at: float) -> None:
        """Publish a new predicted end."""
        assert self._file >= 0, "the lease was released"
        self.info = replace(self.info, ends_at=ends_at)
        with _critical_section(self._path.parent):
            self._write()

    def release(self) -> None:
        """Release the bytes; calling it again has no effect."""
        if self._file >= 0:
            if sys.platform != "win32":  # Windows cannot remove an open file; the next reader does
                self._path.unlink(missing_ok=True)
            self._close()

    def _write(self) -> None:
        content = b" " * _NUM_LOCKED_BYTES + json.dumps(asdict(self.info)).encode()
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, content)
        os.truncate(self._file, len(content))  # after the write: on a full disk the old bytes are reused

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            _held_here.discard(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class Leases:
    """The leases of this machine; all objects on the same folder see the same leases."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder if folder is not None else default_folder()

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
    ) -> Lease | None:
        """Lease bytes of a device; return None when they do not fit next to what is leased or in use.

        `total_bytes` and `free_bytes` are the device's, read just now.  A lease is granted when it fits in
        the free memory and all live leases together fit in what other programs leave.  What other programs
        use is known exactly while there is no live lease; otherwise it is the largest figure recorded by a
        live lease, or the used memory that exceeds all leased bytes if that is more: a program that started
        later is only seen from there on.  Cores add up to at most `total_cores`.

        Raises UserError when the leases' folder cannot be used.
        """
        assert num_bytes >= 0, num_bytes
        assert num_cores >= 0, num_cores
        with self._device(device_uuid) as folder:
            live = _live_leases(folder)
            outside_bytes = _outside_bytes(live, used_bytes=max(0, total_bytes - free_bytes))
            if num_bytes > _left_bytes(live, total_bytes=total_bytes, free_bytes=free_bytes):
                return None
            if num_cores and sum(info.num_cores for info in live) + num_cores > total_cores:
                return None
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
            path = folder / f"{uuid.uuid4().hex}{_SUFFIX}"
            lease = Lease(info, path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            try:
                lease.publish()
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

    @contextlib.contextmanager
    def _device(self, device_uuid: str) -> Iterator[Path]:
        """Enter the critical section of one device and yield its folder."""
        folder = self._folder / re.sub(r"[^\w.-]", "_", device_uuid)
        try:
            _make_private(self._folder)
            folder.mkdir(mode=0o700, exist_ok=True)
            with _critical_section(folder):
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
    """Return the folder of this user's leases on this machine, the same for all of the user's processes.

    It depends on no environment variable: under ssh, sudo or cron XDG_RUNTIME_DIR and TMPDIR are unset or
    differ.  Never in the home folder, which several machines may share.
    """
    if sys.platform == "win32":
        return Path(tempfile.gettempdir()) / "autosft-leases"
    return Path(f"/tmp/autosft-leases-{os.getuid()}")


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
    holder = f"Study {lease.study!r} (trial {lease.trial}, process {lease.pid}) holds {what}"
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
#: How often the lock of the critical section is tried; others hold it for a few file operations.
_POLL_S = 0.01
#: The bytes at the start of the file that Windows does not let others read while it is locked.
_NUM_LOCKED_BYTES = 1 if sys.platform == "win32" else 0
_held_here: set[Lease] = set()  # closed in forked children


def _forget_after_fork() -> None:
    for lease in list(_held_here):
        lease._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def _live_leases(folder: Path) -> list[LeaseInfo]:
    """Return the leases whose holders live and remove the others; call inside the critical section."""
    live: list[LeaseInfo] = []
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue  # released since the listing
        try:
            holder_is_dead = lock_descriptor(file, blocking=False)
            if not holder_is_dead:
                os.lseek(file, _NUM_LOCKED_BYTES, os.SEEK_SET)
                live.append(LeaseInfo(**json.loads(os.read(file, 1 << 16))))
        finally:
            os.close(file)
        if holder_is_dead:
            path.unlink(missing_ok=True)
    return live


def _make_private(folder: Path) -> None:
    """Make the folder; refuse one that another user made in a shared place, to read or block leases."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if sys.platform != "win32":
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise PermissionError(13, "it belongs to another user")


@contextlib.contextmanager
def _critical_section(folder: Path) -> Iterator[None]:
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        lock_descriptor(file, poll_interval=_POLL_S)
        yield
    finally:
        os.close(file)
