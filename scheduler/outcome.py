"""What becomes of a trial whose attempt has ended.  Pure."""

from __future__ import annotations

from autosft.studies.trial import AttemptEnd, FailureKind, StopReason, TrialRecord, TrialState

#: An attempt that is lost this often is not the machine's fault any more.
MAX_LOST_ATTEMPTS = 4


def state_after(end: AttemptEnd, trial: TrialRecord) -> TrialState:
    """What becomes of a trial whose attempt ended like this.  Pure.

    Out of memory and lost workers are tried again (planned smaller, or resumed); a non-finite loss is a
    result; bad data and errors would only happen again.
    """
    if end.completed or end.failure is FailureKind.NON_FINITE_LOSS:
        return TrialState.COMPLETED
    if end.stopped in (StopReason.PRUNED, StopReason.USER):
        return TrialState.STOPPED
    if end.stopped is StopReason.BUDGET:
        return TrialState.STOPPED if trial.measurements else TrialState.WAITING
    if end.stopped is StopReason.SHUTDOWN or end.failure is FailureKind.OUT_OF_MEMORY:
        return TrialState.WAITING  # out of memory: planned again smaller, infeasible when nothing is left
    if end.failure is FailureKind.HOST_OUT_OF_MEMORY:
        return TrialState.WAITING if trial.num_attempts < MAX_LOST_ATTEMPTS else TrialState.INFEASIBLE
    if end.failure is FailureKind.WORKER_LOST:
        return TrialState.WAITING if trial.num_attempts < MAX_LOST_ATTEMPTS else TrialState.FAILED
    return TrialState.FAILED


def ran_out_of_memory(trial: TrialRecord) -> bool:
    return trial.failure is FailureKind.OUT_OF_MEMORY
