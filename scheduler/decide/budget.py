"""How many trials fit in a time budget, and how far each of them is trained.  Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autosft.profiles.errors import UserError
from autosft.profiles.units import duration
from autosft.scheduler.decide.pruning import PruningRule, expected_cost, survivors
from autosft.scheduler.decide.remaining import left_s

#: Number of trials if neither a number nor a time budget was given.
DEFAULT_NUM_TRIALS = 20
#: Maximum number of trials that a time budget alone leads to.
MAX_TRIALS_BY_TIME = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a study is predicted to spend, before it starts."""

    num_trials: int
    study_s: float  # predicted, with pruning
    share: float  # of a full run that a trial is expected to take on average, with pruning
    num_slots: int  # trials at once
    lines: tuple[str, ...]  # for the user
    time_s: float | None = None  # that the user gave
    too_short: str = ""  # what would fit, where not even one full run is predicted to

    def require_time(self) -> None:
        """Raise UserError, with what would fit, if not even one full run is predicted to."""
        if self.too_short and self.time_s is not None:
            raise UserError(
                f"--time-budget {duration(self.time_s)}: not even one full run is predicted to fit.",
                remedy=self.too_short,
            )


def plan_budget(
    *,
    num_trials: int | None,
    time_budget_s: float | None,
    budget_runs: float | None = None,
    num_slots: int,
    full_run_s: float,
    evaluation_s: float,
    untuned_s: float = 0.0,
    rule: PruningRule,
    prune: bool,
    epochs: float = 1.0,
) -> Budget:
    """Return how many trials to run, and a description of what that takes.

    `full_run_s` is a full run of `epochs` including its evaluations, of `evaluation_s` each; `num_slots`
    trials run at once, after the untuned model has been scored, which takes `untuned_s`.  A number of trials
    that the user gave is never changed: if the time is too short for it, the lines say how many are expected
    to finish.
    """
    share = expected_cost(rule) if prune else 1.0
    trial_s = full_run_s * share
    holds = (
        None
        if time_budget_s is None
        else max(1, math.floor(max(0.0, time_budget_s - untuned_s) * num_slots / trial_s))
    )
    asked = num_trials or default_num_trials(holds, budget_runs=budget_runs, rule=rule)
    # The first is the default configuration, which always runs in full.
    rest_s = left_s([full_run_s], num_to_come=asked - 1, trial_s=trial_s, num_slots=num_slots)
    study_s = untuned_s + rest_s
    too_short = ""
    trials = "1 trial" if asked == 1 else f"{asked} trials, {min(asked, num_slots)} at once"
    lines = [
        f"{trials}; a full run takes about {duration(full_run_s)} (predicted), "
        f"{duration(evaluation_s * rule.num_rungs)} of it for {rule.num_rungs} evaluations.",
        "Before the trials the untuned model is scored once on the same examples, in about "
        f"{duration(untuned_s)} (predicted).",
    ]
    lines += pruning_lines(rule, asked, share=share) if prune else []
    if budget_runs is not None:
        study_s = min(study_s, untuned_s + budget_runs * full_run_s / num_slots)
        lines.append(f"Budget: training tokens of {budget_runs:g} full runs; then nothing is started.")
    if time_budget_s is not None:
        lines.append(
            f"Time budget {duration(time_budget_s)}: no trial starts that would not finish within it."
        )
        if holds is not None and holds < asked:
            lines.append(f"About {holds} of the {asked} trials are predicted to fit in it.")
        if untuned_s + full_run_s > time_budget_s:
            too_short = would_fit(full_run_s, time_budget_s=time_budget_s, untuned_s=untuned_s, epochs=epochs)
            lines.append(f"Not even one full run is predicted to fit. {too_short}")
        study_s = min(study_s, time_budget_s)
    lines.append(f"Expected end: in about {duration(study_s)} (predicted).")
    return Budget(
        num_trials=asked,
        study_s=study_s,
        share=share,
        num_slots=num_slots,
        lines=tuple(lines),
        time_s=time_budget_s,
        too_short=too_short,
    )


def default_num_trials(holds: int | None, *, budget_runs: float | None, rule: PruningRule) -> int:
    """Return how many trials to run if no number was given.

    `holds` is how many fit in the time, if that is limited.  A budget of training tokens alone allows as many
    as it has first evaluations.
    """
    if holds is not None:
        return min(holds, MAX_TRIALS_BY_TIME)
    if budget_runs is not None:
        return min(max(1, math.ceil(budget_runs * rule.num_rungs)), MAX_TRIALS_BY_TIME)
    return DEFAULT_NUM_TRIALS


def pruning_lines(rule: PruningRule, num_trials: int, *, share: float) -> list[str]:
    """Describe how far trials are trained; nothing if there are too few to compare."""
    first = f"All see {100 // rule.num_rungs} % of the training tokens"
    last = "the default configuration always runs in full."
    if rule.thaws and num_trials > 1:
        average = f"{100 * share:.0f} % of a full run on average (expected)"
        return [f"{first}; then each goes on where its learning curve promises most, {average}; {last}"]
    if num_trials <= rule.min_peers:
        return []
    reach = survivors(rule, num_trials)
    steps = ", ".join(
        f"about {reach[rung]} continue to {100 * rung // rule.num_rungs} %"
        for rung in range(2, rule.num_rungs + 1)
    )
    return [f"{first}, {steps}; {last}"]


def would_fit(full_run_s: float, *, time_budget_s: float, untuned_s: float, epochs: float) -> str:
    """Return the flags with which one full run would fit in the time, or the time that it would take."""
    needed_s = untuned_s + full_run_s
    hours, minutes = divmod(math.ceil(1.1 * needed_s / 60 - 1e-6), 60)
    longer = f"--time-budget {hours}h{minutes:02}m" if hours else f"--time-budget {minutes}m"
    share = (time_budget_s - untuned_s) / full_run_s
    fewer = math.floor(90 * share * epochs) / 100  # with a tenth to spare
    shorter = f"--epochs {fewer:g}, or " if fewer >= 0.01 else ""
    return f"Would fit: {shorter}{longer} (untuned model and one run: {duration(needed_s)}, predicted)."
