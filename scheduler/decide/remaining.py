"""How long what is left of a study takes: one model for the plan, the live view and the lines.  Pure."""

from __future__ import annotations

from collections.abc import Sequence


def left_s(running_s: Sequence[float], *, num_to_come: int, trial_s: float, num_slots: int) -> float:
    """Return the seconds that are left: of running trials, and of those to come, so many at once.

    `running_s` are what running trials still take, at most; `trial_s` is what one that is still to come takes
    on average, with pruning as planned or as it has been so far.  Never less than the longest one running.
    """
    work_s = sum(running_s) + max(0, num_to_come) * trial_s
    return max([work_s / max(1, num_slots), *running_s])
