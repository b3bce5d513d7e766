"""Which running trials are hopeless: asynchronous successive halving over training tokens.

Li et al., "A System for Massively Parallel Hyperparameter Tuning" (MLSys 2020), in its stopping form: the
rungs are the evaluations of a run, which all trials of a study have at the same shares of the same number
of training tokens, under the same learning-rate horizon, so that a rung compares like with like.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Decision(enum.Enum):
    CONTINUE = "continue"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningRule:
    """When a trial is stopped at a rung.

    A trial goes on when it is among the best 1/`reduction_factor` of all that have reached the rung, itself
    included.  Nothing is stopped before `min_peers` other trials have been there.  Trials that happen to run
    in lockstep are safe from each other only on the first rungs of a study: whoever comes later is compared
    with all who came before.
    """

    reduction_factor: float = 2.0
    min_peers: int = 2
    num_rungs: int = 4  # evaluations of a run; the last is its end, where nothing is left to stop


def decide(
    *,
    rung: int,
    value: float,
    peers: Sequence[float],
    rule: PruningRule,
    minimize: bool,
    is_protected: bool = False,
) -> Decision:
    """Say whether a trial goes on after evaluation `rung` (from 1) with metric `value`.

    `peers` are the values of all other trials at the same rung, finished or not.  A protected trial (the
    default configuration, against which the gain is measured) always runs to its end.
    """
    if is_protected or rung >= rule.num_rungs or len(peers) < rule.min_peers:
        return Decision.CONTINUE
    if not math.isfinite(value):
        return Decision.STOP
    better = sum(1 for peer in peers if (peer < value if minimize else peer > value))
    num_promoted = max(1, math.ceil((len(peers) + 1) / rule.reduction_factor))
    return Decision.CONTINUE if better < num_promoted else Decision.STOP


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
