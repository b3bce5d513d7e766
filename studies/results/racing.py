"""Racing checkpoints over prompts: few are spent on a hopeless one, and scores stay comparable.  Pure.

All candidates answer the same prompts in the same order.  Against the best so far, the incumbent, only the
prompts on which the two differ tell anything (McNemar 1947): a candidate is given up as soon as an exact
sign test on them says that it is worse.
"""

from __future__ import annotations

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
    from scipy.special import bdtr  # the binomial distribution; a training process has it loaded

    return bool(bdtr(wins, wins + losses, 0.5) < ALPHA)


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


def describe_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> str:
    """Say how the better of two models compares with the other on prompts that both have answered.

    With the p-value of an exact two-sided sign test; above 0.05 it is called a tie.
    """
    from scipy.stats import binomtest

    pairs = list(zip(ours, theirs, strict=False))
    wins = sum(mine and not other for mine, other in pairs)
    losses = sum(other and not mine for mine, other in pairs)
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    counts = f"{wins} prompts gained and {losses} lost of {len(pairs)} (sign test, p = {p:.2g})"
    return f"a tie, {counts}" if p > 0.05 else counts
