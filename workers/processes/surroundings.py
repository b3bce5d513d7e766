"""Find causes of a failure outside of the trial: a disk, a folder, a model or a limit.

Runs after a failure, on the machine where it happened.  It checks what an attempt needs: that its inputs
exist, and that its folders can be written to.  Problems that have disappeared since are recognised by the
error code in the exception (`is_of_surroundings`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

from autosft.profiles.sources import has_moved
from autosft.studies.trial import TrialJob

#: Error codes that no setting of a trial causes.  Out of memory (ENOMEM), a full disk (ENOSPC) and lost
#: connections are handled separately.
ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,  # from fork: no further process is allowed
        errno.EBUSY,
        errno.EFBIG,
        errno.ENODEV,
        errno.ENXIO,
        errno.ESTALE,
        errno.ENOTCONN,  # a mount whose server is gone
        errno.ENAMETOOLONG,
        errno.EADDRINUSE,
        errno.EADDRNOTAVAIL,
    }
)
#: The corresponding messages of libraries in C++ and Rust.
WORDS = (
    "Read-only file system",
    "Input/output error",
    "Too many open files",
    "Stale file handle",
    "PytorchStreamWriter failed",
    "os error 2)",
    "os error 5)",
    "os error 13)",
    "os error 24)",
    "os error 30)",
)
#: Written to check whether a folder is writable.
PROBE_BYTES = 1 << 16


def is_of_surroundings(error: BaseException) -> bool:
    """Return whether an exception itself shows that the cause is outside of the trial."""
    if isinstance(error, OSError) and error.errno in ERRNOS:
        return True
    return any(words in str(error) for words in WORDS)


def cause(job: TrialJob) -> str | None:
    """Return a description of what is wrong around an attempt now, None if nothing is found.

    Writes a small file where the attempt writes, and removes it.
    """
    return missing_input(job) or unwritable(Path(job.output_dir)) or unwritable(Path(tempfile.gettempdir()))


def missing_input(job: TrialJob) -> str | None:
    """Return a description of an attempt's missing input, if any."""
    if has_moved(job.model):
        return (
            f"the model {job.model} is not there any more: it was moved, deleted, or its disk is not mounted"
        )
    if has_moved(job.data_dir):
        return f"the prepared data in {job.data_dir} are gone: the cache was deleted while the study ran"
    if job.resume_from is not None and has_moved(job.resume_from):
        return f"the checkpoint {job.resume_from} is gone: the output folder was moved or deleted"
    return None


def unwritable(folder: Path) -> str | None:
    """Return why a folder, created if missing, cannot be written to; None if it can."""
    probe = folder / f".autosft-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"nothing can be written to {folder}: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def at_process_limit() -> str | None:
    """Return which limit of processes and threads is reached, None if none is (Linux)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and "pids" not in controllers.split(","):
                continue
            top = Path("/sys/fs/cgroup") if number == "0" else Path("/sys/fs/cgroup/pids")
            for group in (top / path.lstrip("/"), top):
                with contextlib.suppress(OSError, ValueError):
                    limit, current = ((group / f"pids.{name}").read_text() for name in ("max", "current"))
                    if int(current) + 2 >= int(limit):  # "max" is not a number
                        return f"the limit of {int(limit)} processes and threads (pids.max) is reached"
    return None
