"""Racing checkpoints over prompts: hopeless ones are abandoned early, and scores stay comparable.  Pure.

All candidates answer the same prompts in the same order.  Only the prompts on which a candidate and the best
so far, the incumbent, differ are informative (McNemar 1947): a candidate is abandoned as soon as an exact
sign test on them shows that it is worse.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Number of prompts between two tests.
BLOCK = 32
#: One-sided error of a single test.  With the 17 tests of 541 prompts, a candidate as good as the incumbent
#: is abandoned in less than 4 % of the races (measured in tests/studies/results/test_racing.py).
ALPHA = 0.005


def is_hopeless(candidate: Sequence[bool], incumbent: Sequence[bool]) -> bool:
    """Whether the candidate is worse than the incumbent on the prompts that it has answered so far."""
    pairs = list(zip(candidate, incumbent, strict=False))
    wins = sum(ours and not theirs for ours, theirs in pairs)
    losses = sum(theirs and not ours for ours, theirs in pairs)
    from scipy.special import bdtr  # the binomial distribution; a training process has it loaded

    return bool(bdtr(wins, wins + losses, 0.5) < ALPHA)


def estimated_score(candidate: Sequence[bool], incumbent: Sequence[bool] | None) -> float:
    """Return the share of all prompts that a candidate follows, even if it has answered only the first.

    The incumbent's score over all prompts plus the mean difference on the prompts that both have answered:
    the difference estimator (Cochran 1977, section 7.2).  An abandoned candidate is thus not judged by how
    hard the first prompts happen to be.
    """
    assert candidate
    num = len(candidate)
    if incumbent is None or num >= len(incumbent):
        return sum(candidate) / num
    difference = (sum(candidate) - sum(incumbent[:num])) / num
    return min(1.0, max(0.0, sum(incumbent) / len(incumbent) + difference))


def describe_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> str:
    """Describe how the better of two models compares with the other on prompts that both have answered.

    Gives the p-value of an exact two-sided sign test; above 0.05 the result is called a tie.
    """
    from scipy.stats import binomtest

    pairs = list(zip(ours, theirs, strict=False))
    wins = sum(mine and not other for mine, other in pairs)
    losses = sum(other and not mine for mine, other in pairs)
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    prompts = "prompt" if wins == 1 else "prompts"
    counts = f"{wins} {prompts} gained and {losses} lost of {len(pairs)} (sign test, p = {p:.2g})"
    return f"a tie, {counts}" if p > 0.05 else counts
