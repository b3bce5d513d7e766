"""Estimate the remaining time of a run from the time that its parts have taken so far.

Steps take time in proportion to their padded tokens, which are known for the whole run; evaluations, answers
and checkpoints take as long as the last one.  Parts that have not occurred yet are predicted, scaled by the
ratio of measured to predicted step times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from autosft.profiles.recipe import RunTime

#: The first steps select kernels and touch memory for the first time; they are not counted.
NUM_WARM_UP = 2
#: The number of steps before there is an estimate.
MIN_STEPS = 3
#: The pace is that of the latest steps, since other load on the machine varies.
NUM_RECENT = 100


class Pace:
    """The pace of one attempt; step numbers are optimizer steps from 1."""

    def __init__(
        self,
        padded_at_step: Sequence[int],
        evaluation_steps: Collection[int],
        expected: RunTime | None,
    ) -> None:
        """`padded_at_step[n]`: padded tokens of the first n steps; `expected`: the plan's prediction."""
        self.padded_at_step, self.evaluation_steps = padded_at_step, evaluation_steps
        self.expected = expected
        self.recent: deque[tuple[int, float]] = deque(maxlen=NUM_RECENT)
        self.num_steps = 0
        self.evaluation_s: float | None = None
        self.answers_s: float | None = None
        self.checkpoint_s: float | None = None

    def step_took(self, step: int, seconds: float) -> None:
        """Record the seconds of an optimizer step, without evaluation or saving after it."""
        self.num_steps += 1
        if self.num_steps > NUM_WARM_UP:
            self.recent.append((self.padded_at_step[step] - self.padded_at_step[step - 1], seconds))

    def evaluation_took(self, *, checkpoint_s: float, evaluation_s: float, answers_s: float) -> None:
        """Record the seconds of an evaluation, of the checkpoint before it and of the answers after it."""
        self.checkpoint_s, self.evaluation_s, self.answers_s = checkpoint_s, evaluation_s, answers_s

    def remaining_s(self, step: int, *, is_evaluated: bool) -> float | None:
        """Return the predicted seconds from the end of a step to the end of the run; None at first.

        `is_evaluated`: the evaluation that is due at this step, if any, is over.
        """
        if len(self.recent) < MIN_STEPS:
            return None
        token_s = sum(seconds for _, seconds in self.recent) / sum(tokens for tokens, _ in self.recent)
        training_s = token_s * (self.padded_at_step[-1] - self.padded_at_step[step])
        num_left = sum(due > step or (due == step and not is_evaluated) for due in self.evaluation_steps)
        return training_s + num_left * self._evaluation_s(token_s)

    def _evaluation_s(self, token_s: float) -> float:
        """Return the seconds of one evaluation with its checkpoint and answers."""
        expected = self.expected
        if expected is None or not expected.training_s:
            seen = (self.checkpoint_s, self.evaluation_s, self.answers_s)
            return sum(seconds for seconds in seen if seconds is not None)
        likely = expected.at_speed(expected.training_s / (token_s * self.padded_at_step[-1]))
        return (
            _measured_or(self.checkpoint_s, likely.checkpoint_s)
            + _measured_or(self.evaluation_s, likely.evaluation_s)
            + _measured_or(self.answers_s, likely.answers_s)
        )


def _measured_or(measured: float | None, expected: float) -> float:
    return expected if measured is None else measured
