"""A study without a result says why, and what helps, in one sentence."""

from __future__ import annotations

import dataclasses

import pytest

from autosft.scheduler.decide.no_result import why_no_result
from autosft.studies.trial import FailureKind, TrialRecord, TrialState
from tests.studies.report_examples import made_up_report

RECORD = dataclasses.replace(
    made_up_report(6).trials[0], measurements=(), value=None, failure=None, message="", num_attempts=1
)


def failed(kind: FailureKind, message: str = "", *, number: int = 0) -> TrialRecord:
    state = TrialState.INFEASIBLE if kind.is_out_of_device_memory else TrialState.FAILED
    return dataclasses.replace(RECORD, number=number, state=state, failure=kind, message=message)


CASES = {
    "the only trial ran out of memory": (
        (failed(FailureKind.OUT_OF_MEMORY, "2.1 GiB of 2.0."),),
        "the only trial: out of device memory, 2.1 GiB of 2.0; a shorter --seq-len",
    ),
    "the first of several": (
        tuple(failed(FailureKind.NON_FINITE_LOSS, number=n) for n in range(3)),
        "trial 0, the first of 3 to fail: non-finite loss; try a lower --learning-rate",
    ),
    "no plan was left": (
        (dataclasses.replace(RECORD, state=TrialState.INFEASIBLE, message="needs 9 GiB\nof 8"),),
        "the only trial: needs 9 GiB; a shorter --seq-len",
    ),
    "a full disk": ((failed(FailureKind.DISK_FULL),), "disk full; make room"),
    "the time was over": ((dataclasses.replace(RECORD, state=TrialState.WAITING),), "the time budget ended"),
    "nothing was asked": ((), "the time budget ended before the first evaluation; a longer --time-budget"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cause_and_the_remedy_are_said_in_one_sentence(case: str) -> None:
    trials, expected = CASES[case]
    said = why_no_result(trials, is_time_over=True)
    assert said.startswith("no trial has a result: ")
    assert expected in said
    assert "\n" not in said
    assert said.endswith(".")


@pytest.mark.parametrize("kind", FailureKind)
def test_every_failure_has_words(kind: FailureKind) -> None:
    assert kind.value in why_no_result([failed(kind)], is_time_over=False)
