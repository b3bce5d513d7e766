"""What becomes of a trial whose attempt has ended."""

from __future__ import annotations

import pytest

from autosft.scheduler.loop.transitions import MAX_LOST_ATTEMPTS, state_after
from autosft.studies.trial import FailureKind, StopReason, TrialRecord, TrialState
from tests.workers.scripted import end, make_job

JOB = make_job()
TRIAL = TrialRecord(
    number=7,
    state=TrialState.RUNNING,
    settings=JOB.settings,
    parameters=(),
    origin="default",
    plan=JOB.plan,
    num_attempts=9,
    value=None,
    best_step=None,
    best_checkpoint=None,
    failure=None,
    message="",
    measurements=(),
    started_at=0.0,
    finished_at=None,
)


@pytest.mark.parametrize(
    ("failure", "num_lost", "expected"),
    [
        (FailureKind.WORKER_LOST, 1, TrialState.WAITING),
        (FailureKind.WORKER_LOST, MAX_LOST_ATTEMPTS - 1, TrialState.WAITING),
        (FailureKind.WORKER_LOST, MAX_LOST_ATTEMPTS, TrialState.FAILED),
        (FailureKind.HOST_OUT_OF_MEMORY, MAX_LOST_ATTEMPTS - 1, TrialState.WAITING),
        (FailureKind.HOST_OUT_OF_MEMORY, MAX_LOST_ATTEMPTS, TrialState.INFEASIBLE),
        (FailureKind.WRONG_STEP, 0, TrialState.FAILED),
    ],
)
def test_a_lost_trial_is_tried_again_but_not_forever(
    failure: FailureKind, num_lost: int, expected: TrialState
) -> None:
    assert state_after(end(JOB, failure=failure), TRIAL, num_lost=num_lost) is expected


@pytest.mark.parametrize(
    ("failure", "stopped", "expected"),
    [
        (None, None, TrialState.COMPLETED),
        (FailureKind.NON_FINITE_LOSS, None, TrialState.COMPLETED),
        (FailureKind.OUT_OF_MEMORY, None, TrialState.WAITING),
        (FailureKind.HOST_OUT_OF_MEMORY, None, TrialState.WAITING),
        (FailureKind.DISK_FULL, None, TrialState.WAITING),
        (FailureKind.NOT_STARTED, None, TrialState.WAITING),
        (FailureKind.BAD_DATA, None, TrialState.FAILED),
        (FailureKind.ERROR, None, TrialState.FAILED),
        (None, StopReason.PRUNED, TrialState.STOPPED),
        (None, StopReason.SHUTDOWN, TrialState.WAITING),
        (None, StopReason.BUDGET, TrialState.WAITING),
    ],
)
def test_each_end_has_its_state(
    failure: FailureKind | None, stopped: StopReason | None, expected: TrialState
) -> None:
    ended = end(JOB, failure=failure, stopped=stopped)
    assert state_after(ended, TRIAL, num_lost=0) is expected
