"""The next state of a trial whose attempt has ended.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

from autosft.studies.trial import AttemptEnd, FailureKind, StopReason, TrialRecord, TrialState

#: Number of losses without an evaluation in between after which the trial, not the machine, is at fault.
MAX_LOST_ATTEMPTS = 4


def state_after(
    end: AttemptEnd, trial: TrialRecord, *, num_lost: int, is_user_paused: bool = False
) -> TrialState:
    """Return the next state of a trial whose attempt ended with `end`.

    Out of memory and lost workers are retried (replanned smaller, or resumed).  A non-finite loss is a
    result.  Bad data and errors would only happen again.  Failing to start, or because of the environment,
    says nothing about the trial.  `num_lost`: its attempts lost since its last evaluation, including this
    one.  `is_user_paused`: the user still wants it paused; a trial that was asked to pause and has been
    resumed since waits for a device.
    """
    if end.completed or end.failure is FailureKind.NON_FINITE_LOSS:
        return TrialState.COMPLETED
    if end.stopped in (StopReason.PRUNED, StopReason.USER):
        return TrialState.STOPPED
    if end.stopped is StopReason.RUNG:
        return TrialState.PAUSED
    if end.stopped is StopReason.PAUSED:
        return TrialState.PAUSED if is_user_paused else TrialState.WAITING
    if end.stopped in (StopReason.BUDGET, StopReason.TARGET):
        return TrialState.STOPPED if trial.measurements else TrialState.WAITING
    if end.failure in (FailureKind.DISK_FULL, FailureKind.NOT_STARTED):
        return TrialState.WAITING
    if end.failure is not None and end.failure.is_of_surroundings:
        return TrialState.WAITING
    if end.stopped is StopReason.SHUTDOWN or (end.failure and end.failure.is_out_of_device_memory):
        return TrialState.WAITING  # out of memory: replanned smaller, infeasible if no plan is left
    if end.failure is FailureKind.HOST_OUT_OF_MEMORY:
        return TrialState.WAITING if num_lost < MAX_LOST_ATTEMPTS else TrialState.INFEASIBLE
    if end.failure is FailureKind.WORKER_LOST:
        return TrialState.WAITING if num_lost < MAX_LOST_ATTEMPTS else TrialState.FAILED
    return TrialState.FAILED


def is_loss(end: AttemptEnd) -> bool:
    """Whether an attempt was lost because of its environment, as far as can be told, not its trial."""
    return end.failure in (FailureKind.WORKER_LOST, FailureKind.HOST_OUT_OF_MEMORY)


def may_be_tried_again(trial: TrialRecord) -> bool:
    """Whether a later run retries a failed trial, since its environment was at fault as far as can be told.

    Earlier versions recorded such failures as errors of the trial.  They are recognised by the exception: an
    OSError with the kernel's reason in it.
    """
    if trial.state is not TrialState.FAILED:
        return False
    if trial.failure in (FailureKind.WORKER_LOST, FailureKind.DISK_FULL, FailureKind.NOT_STARTED):
        return True
    if trial.failure is not None and trial.failure.is_of_surroundings:
        return True
    return trial.failure is FailureKind.ERROR and bool(
        re.match(r"[\w.]*Error: \[Errno \d+\] ", trial.message)
    )


def ran_out_of_memory(trial: TrialRecord) -> bool:
    return trial.failure is not None and trial.failure.is_out_of_device_memory


def evaluation_batch(pinned: int, trials: Iterable[TrialRecord]) -> int:
    """Return the evaluation batch of future trials.

    As pinned, until an evaluation has run out of memory: then half of what that trial had, for all trials
    alike.  Scores are sums over examples and differ by rounding alone.
    """
    batch = pinned
    for trial in trials:
        if trial.plan is None:
            continue
        evaluated = trial.plan.eval_micro_batch or pinned
        if trial.failure is FailureKind.EVALUATION_OUT_OF_MEMORY:
            evaluated = max(1, evaluated // 2)
        batch = min(batch, evaluated)
    return batch
