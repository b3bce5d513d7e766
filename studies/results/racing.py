"""Racing checkpoints over prompts: few are spent on a hopeless one, and scores stay comparable.  Pure.

All candidates answer the same prompts in the same order.  Against the best so far, the incumbent, only the
prompts on which the two differ tell anything (McNemar 1947): a candidate is given up as soon as an exact
sign test on them says that it is worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Prompts between two looks at the race.
BLOCK = 32
#: One-sided error of a single look.  With the 17 looks of 541 prompts a candidate that is as good as the
#: incumbent is given up in less than 4 % of the races (measured in tests/studies/results/test_racing.py).
ALPHA = 0.005


def is_hopeless(candidate: Sequence[bool], incumbent: Sequence[bool]) -> bool:
    """Tell whether the candidate is worse than the incumbent on the prompts that it has answered so far."""
    pairs = list(zip(candidate, incumbent, strict=False))
    wins = sum(ours and not theirs for ours, theirs in pairs)
    losses = sum(theirs and not ours for ours, theirs in pairs)
    return binomial_cdf(wins, wins + losses) < ALPHA


def binomial_cdf(successes: int, trials: int) -> float:
    """Return the probability of at most so many successes in `trials` throws of a fair coin."""
    ways: int = sum(math.comb(trials, k) for k in range(successes + 1))
    return ways / (1 << trials)


def estimated_score(candidate: Sequence[bool], incumbent: Sequence[bool] | None) -> float:
    """Return the share of all prompts that a candidate follows, also where it has answered only the first.

    The incumbent's score over all prompts plus the mean difference on those that both have answered: the
    difference estimator (Cochran 1977, section 7.2), so that a candidate that was given up early is not
    judged by how hard the first prompts happen to be.
    """
    assert candidate
    num = len(candidate)
    if incumbent is None or num >= len(incumbent):
        return sum(candidate) / num
    difference = (sum(candidate) - sum(incumbent[:num])) / num
    return min(1.0, max(0.0, sum(incumbent) / len(incumbent) + difference))


def wilson_interval(successes: float, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return the interval of a share (Wilson 1927), 95 % by default."""
    assert trials > 0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def difference_in_words(ours: Sequence[bool], theirs: Sequence[bool]) -> str:
    """Say how the better of two models compares with the other on prompts that both have answered.

    With the p-value of an exact two-sided sign test; above 0.05 it is called a tie.
    """
    pairs = list(zip(ours, theirs, strict=False))
    wins = sum(one and not other for one, other in pairs)
    losses = sum(other and not one for one, other in pairs)
    p = min(1.0, 2 * binomial_cdf(min(wins, losses), wins + losses))
    counts = f"{wins} prompts gained and {losses} lost of {len(pairs)} (sign test, p = {p:.2g})"
    return f"a tie, {counts}" if p > 0.05 else counts
