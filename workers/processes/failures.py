"""Classify the exception that ended an attempt."""

from __future__ import annotations

from pathlib import Path

from autosft.profiles.errors import StorageError, UserError
from autosft.studies.trial import AttemptEnd, FailureKind, Measurement, TrialJob
from autosft.workers.device import TrialDevice, device_of
from autosft.workers.processes import surroundings
from autosft.workers.scoring.evaluation import was_evaluating
from autosft.workers.training.applied_step import WrongStepError
from autosft.workers.training.disk import is_disk_full

# Not every failed allocation raises MemoryError: torch's CPU allocator, C++, oneDNN (a primitive includes its
# scratch memory), the loader of shared libraries and Python's threads have messages of their own.
CPU_ALLOCATION_FAILURES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "Cannot allocate memory",
    "could not create a memory object",
    "could not create a primitive",
    "failed to map segment from shared object",
    "can't start new thread",
)
# How torch.distributed reports an unreachable rank: its exceptions, and gloo's source files in messages.
LOST_RANK = ("torch.distributed.Dist", "/gloo/transport/", "/gloo/gloo/", "Connection closed by peer")


def failure_kind(error: BaseException, device: TrialDevice) -> FailureKind:
    """Classify an exception raised by training on a kind of device.

    An inconclusive exception is classified by the exception during whose handling it was
    raised: near the limit, clean-up after a failed allocation often fails as well, with an error of its own.
    """
    kind, seen = _kind_of(error, device), error
    while kind is FailureKind.ERROR:
        earlier = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
        if earlier is None:
            break
        kind, seen = _kind_of(earlier, device), earlier
    if kind is FailureKind.OUT_OF_MEMORY and was_evaluating(error):
        return FailureKind.EVALUATION_OUT_OF_MEMORY
    return kind


def _kind_of(error: BaseException, device: TrialDevice) -> FailureKind:
    if any(f"{cls.__module__}.{cls.__name__}" == "torch.OutOfMemoryError" for cls in type(error).__mro__):
        return FailureKind.OUT_OF_MEMORY
    if "can't start new thread" in str(error) and surroundings.at_process_limit() is not None:
        return FailureKind.SURROUNDINGS
    if isinstance(error, MemoryError) or any(text in str(error) for text in CPU_ALLOCATION_FAILURES):
        return device.host_allocation_failure
    if isinstance(error, UserError):
        return FailureKind.BAD_DATA
    if isinstance(error, WrongStepError):
        return FailureKind.WRONG_STEP
    if isinstance(error, StorageError):
        return FailureKind.STORAGE
    if is_disk_full(error):
        return FailureKind.DISK_FULL
    if surroundings.is_of_surroundings(error):
        return FailureKind.SURROUNDINGS
    if any(text in f"{type(error).__module__}.{type(error).__name__}: {error}" for text in LOST_RANK):
        return FailureKind.WORKER_LOST
    return FailureKind.ERROR


#: What may have come of the surroundings although nothing in it says so.
UNEXPLAINED = (
    FailureKind.ERROR,
    FailureKind.BAD_DATA,
    FailureKind.WORKER_LOST,
    FailureKind.SURROUNDINGS,
)


def told(job: TrialJob, kind: FailureKind, message: str) -> tuple[FailureKind, str]:
    """Return how a failure is told: as its surroundings' where these are at fault, the cause in words."""
    if kind not in UNEXPLAINED:
        return kind, message
    cause = surroundings.cause(job) or surroundings.at_process_limit()
    if cause is None:
        return kind, message
    return FailureKind.SURROUNDINGS, f"{cause} ({message})"


def failed(
    job: TrialJob, error: BaseException, log_path: Path, duration_s: float, last: Measurement | None
) -> AttemptEnd:
    """Return the end of an attempt that raised `error`; what is wrong around it comes first."""
    text = " ".join(str(error).split())[:500]
    kind, message = told(
        job,
        failure_kind(error, device_of(job)),
        text if isinstance(error, UserError | WrongStepError) else f"{type(error).__name__}: {text}",
    )
    return AttemptEnd(
        trial=job.trial,
        attempt=job.attempt,
        completed=False,
        stopped=None,
        failure=kind,
        message=message,
        log_path=str(log_path),
        peak_allocated_bytes=last.peak_allocated_bytes if last else None,
        peak_reserved_bytes=last.peak_reserved_bytes if last else None,
        duration_s=duration_s,
        eval_fingerprint=None,
    )
