"""Why a study that is over has no result, and what to do about it.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from autosft.studies.trial import FailureKind, TrialRecord, TrialState

_REMEDIES = {
    FailureKind.OUT_OF_MEMORY: "a shorter --seq-len or --method lora needs less, autosft plan says what fits",
    FailureKind.EVALUATION_OUT_OF_MEMORY: "a shorter --seq-len or shorter --eval-data needs less",
    FailureKind.HOST_OUT_OF_MEMORY: "--max-concurrent 1 runs one trial at a time",
    FailureKind.NON_FINITE_LOSS: "try a lower --learning-rate or --precision fp32",
    FailureKind.DISK_FULL: "make room on the disk of --output, or choose another",
    FailureKind.WORKER_LOST: "look at the log, and run the same command again",
    FailureKind.STORAGE: "run the same command again once the storage can be reached",
}
_OF_TIME = "a longer --time-budget, fewer --epochs or more --evaluations would give a first result"
_OTHERWISE = "look at the trial's log, and run the same command again"


def why_no_result(trials: Sequence[TrialRecord], *, is_time_over: bool) -> str:
    """Say in one sentence why no trial has a result and what helps, by what befell the first that failed."""
    failed = next((trial for trial in trials if trial.failure is not None), None)
    if failed is None or failed.failure is None:
        infeasible = next((trial for trial in trials if trial.state is TrialState.INFEASIBLE), None)
        if infeasible is not None:  # no plan was left for it
            what = _first_line(infeasible.message) or "it does not fit in memory"
            return _sentence(infeasible, len(trials), what, _REMEDIES[FailureKind.OUT_OF_MEMORY])
        if is_time_over:
            return f"no trial has a result: the time budget ended before the first evaluation; {_OF_TIME}."
        return f"no trial has a result: none was evaluated; {_OTHERWISE}."
    what = failed.failure.value
    if message := _first_line(failed.message):
        what = f"{what}, {message}"
    return _sentence(failed, len(trials), what, _REMEDIES.get(failed.failure, _OTHERWISE))


def _sentence(trial: TrialRecord, num_trials: int, what: str, remedy: str) -> str:
    of = "the only trial" if num_trials == 1 else f"trial {trial.number}, the first of {num_trials} to fail"
    return f"no trial has a result: {of}: {what.rstrip('.')}; {remedy}."


def _first_line(message: str) -> str:
    return next((line.strip() for line in message.splitlines() if line.strip()), "")
