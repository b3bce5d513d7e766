"""Which trials continue: asynchronous successive halving over training tokens.

Li et al., "A System for Massively Parallel Hyperparameter Tuning" (MLSys 2020).  The rungs are the
evaluations of a run.  All trials of a study have them at the same shares of the same number of training
tokens, under the same learning-rate horizon, so values at a rung are comparable.

In the stopping form, a trial that is not among the best at a rung ends; early arrivals continue, since
nothing is there to compare them with.  In the pausing form, the paper's, a trial gives up its device, with
a checkpoint, and is promoted once it is among the best: this trains less, at the price of a restart per
promotion and a checkpoint with optimizer state per paused trial.

A freeze-thaw search (`autosft.studies.search.freeze_thaw`), the default, decides by a model of what each
trial will end at instead of by rank; its rule only says at how many rungs.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


class Decision(enum.Enum):
    """What happens to a trial at a rung."""

    CONTINUE = "continue"
    PAUSE = "pause"  #: gives up its device; continues from its checkpoint once promoted
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningRule:
    """When a trial is stopped at a rung.

    A trial continues if it is among the best 1/`reduction_factor` of all that have reached the rung, itself
    included.  Nothing is stopped before `min_peers` other trials have reached it.  Trials that run in
    lockstep do not affect each other only on the first rungs of a study: later arrivals are compared with all
    earlier ones.
    """

    reduction_factor: float = 2.0
    min_peers: int = 2
    num_rungs: int = 4  # evaluations of a run; the last is its end, where nothing is stopped
    pauses: bool = False  # whether trials that are not among the best are paused instead of stopped
    thaws: bool = False  # whether a model of the curves decides instead of ranks; trials are paused then


def decide(
    *,
    rung: int,
    value: float,
    peers: Sequence[float],
    rule: PruningRule,
    minimize: bool,
    is_protected: bool = False,
) -> Decision:
    """Decide whether a trial continues after evaluation `rung` (from 1) with metric `value`.

    `peers` are the values of all other trials at the same rung, finished or not.  A protected trial (the
    default configuration, against which the gain is measured) always runs to its end.
    """
    if is_protected or rung >= rule.num_rungs:
        return Decision.CONTINUE
    if rule.pauses:
        if not math.isfinite(value):
            return Decision.STOP
        num_promoted = math.floor((len(peers) + 1) / rule.reduction_factor)
        has_earned_it = len(peers) >= rule.min_peers and num_better(value, peers, minimize) < num_promoted
        return Decision.CONTINUE if has_earned_it else Decision.PAUSE
    if len(peers) < rule.min_peers:
        return Decision.CONTINUE
    if not math.isfinite(value):
        return Decision.STOP
    num_promoted = max(1, math.ceil((len(peers) + 1) / rule.reduction_factor))
    return Decision.CONTINUE if num_better(value, peers, minimize) < num_promoted else Decision.STOP


def num_better(value: float, peers: Sequence[float], minimize: bool) -> int:
    return sum(1 for peer in peers if (peer < value if minimize else peer > value))


def promotions(
    rungs: Mapping[int, Mapping[int, float]],
    paused: Collection[int],
    *,
    rule: PruningRule,
    minimize: bool,
    is_last_call: bool,
) -> frozenset[int]:
    """Return the paused trials that have earned their next rung.

    `rungs` holds {rung: {trial: value}} of all trials, whatever their state.  A trial is promoted from the
    last rung that it reached if it is among the best 1/`reduction_factor` there.  At the last call, when no
    new trial will come, that share is rounded up, so that the best of each rung continues.
    """
    promoted: set[int] = set()
    last_rung = {trial: rung for rung in sorted(rungs) for trial in rungs[rung] if trial in paused}
    for rung, values in rungs.items():
        here = sorted((value if minimize else -value, trial) for trial, value in values.items())
        share = len(here) / rule.reduction_factor
        enough = is_last_call or len(here) > rule.min_peers
        number = max(1, math.ceil(share)) if is_last_call else math.floor(share)
        best = {trial for value, trial in here[:number] if math.isfinite(value)} if enough else set()
        promoted |= {trial for trial in best if last_rung.get(trial) == rung}
    return frozenset(promoted)


def expected_cost(rule: PruningRule) -> float:
    """Return the share of a full run that a trial is expected to cost when trials differ at random.

    With evenly spaced rungs and a share 1/r surviving each: (1 + 1/r + 1/r^2 + …) / num_rungs.
    """
    shares = [rule.reduction_factor**-rung for rung in range(rule.num_rungs)]
    return sum(shares) / rule.num_rungs


def survivors(rule: PruningRule, num_trials: int) -> Mapping[int, int]:
    """Return {rung: how many of `num_trials` are expected to reach it}, for the plan shown to the user."""
    return {
        rung: max(1, math.ceil(num_trials * rule.reduction_factor ** -(rung - 1)))
        for rung in range(1, rule.num_rungs + 1)
    }
