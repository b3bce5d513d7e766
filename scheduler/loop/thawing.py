"""Freeze-thaw search in the loop: which trials go on, and what a new one gets.  Writes `Loop.thaw`."""

from __future__ import annotations

import math
from collections.abc import Collection

from autosft.scheduler.decide.pruning import Decision
from autosft.scheduler.events import TrialEnded, TrialForecast
from autosft.scheduler.loop.state import Loop
from autosft.studies.search.freeze_thaw.choose import Choice, Worth
from autosft.studies.search.freeze_thaw.proposal import Next, Rules, as_value, decide_next
from autosft.studies.trial import Measurement, TrialState

#: A running trial goes on if it is worth this share of the best alternative, which would have to be started.
_STAYS_AT = 0.8
#: Going on is not worth it below this share of the noise of an evaluation.
_LEAST_GAIN = 0.1
#: ... and below this improvement in log loss, whatever the noise.
_LEAST_LOG_LOSS = 1e-4


def next_step(loop: Loop, paused: Collection[int], *, may_start: bool) -> Next:
    """Return what a free slot does next; while the records stay as they are, it is decided once."""
    spec, trials = loop.records.spec, loop.records.trials()
    known = tuple((trial.state, len(trial.measurements), trial.value) for trial in trials)
    key = (known, frozenset(paused), may_start)
    if loop.thaw.key == key and loop.thaw.found is not None:
        return loop.thaw.found
    rules = Rules(
        space=spec.space,
        metric=spec.metric,
        minimize=loop.run.minimize,
        num_evaluations=loop.run.rule.num_rungs,
        seed=spec.seed,
        earlier=loop.run.earlier,
    )
    loop.thaw.key = key
    loop.thaw.found = decide_next(rules, trials, paused=paused, may_start=may_start)
    return loop.thaw.found


def thawed_trial(loop: Loop, paused: Collection[int], *, may_start: bool) -> int | None:
    """Return the paused trial to go on with; None if a new one is worth more, or none is worth it."""
    if may_start and loop.records.has_queued():
        return None
    found = next_step(loop, paused, may_start=may_start)
    if found.trial is None or found.choice is None:
        return None
    is_worth_it = may_start or is_worth(found.choice.of_curves[found.trial], found.choice)
    return found.trial if is_worth_it else None


def decide_to_go_on(loop: Loop, measurement: Measurement, *, value: float, may_start: bool) -> Decision:
    """Decide whether a trial that was just evaluated keeps its device.

    It does if nothing else is worth clearly more: another one would have to be started first.
    """
    if not math.isfinite(value):
        return Decision.STOP
    if may_start and loop.records.has_queued():
        return Decision.PAUSE
    here = measurement.trial
    found = next_step(loop, {*paused_at_rungs(loop), here}, may_start=may_start)
    if found.choice is None or here not in found.choice.of_curves:
        return Decision.PAUSE
    own, best = found.choice.of_curves[here], found.choice.worth
    assert best is not None
    goes_on = found.trial == here or own.per_cost >= _STAYS_AT * best.per_cost
    if not may_start and not is_worth(own, found.choice):
        goes_on, reason = False, "what it may still gain is lost in the noise of an evaluation"
    elif found.trial == here:
        reason = "it promises most per token"
    else:
        other = "new settings promise" if found.trial is None else f"trial {found.trial} promises"
        ratio = best.per_cost / own.per_cost
        reason = f"{other} {ratio:.1f} times as much per token" if ratio < 100 else f"{other} far more"
        reason = f"{reason}, too little to change" if goes_on else reason
    loop.observe(forecast(loop, here, own, value=value, goes_on=goes_on, reason=reason))
    return Decision.CONTINUE if goes_on else Decision.PAUSE


def forecast(
    loop: Loop, trial: int, worth: Worth, *, value: float, goes_on: bool, reason: str
) -> TrialForecast:
    """Return what is expected of a trial, in the study's metric."""
    end, *ends = (
        as_value(loss, minimize=loop.run.minimize, is_share=value <= 1)
        for loss in (worth.end, worth.low, worth.high)
    )
    return TrialForecast(
        trial=trial,
        end=end,
        low=min(ends),
        high=max(ends),
        gain=worth.gain,
        cost=worth.cost,
        goes_on=goes_on,
        reason=reason,
    )


def paused_at_rungs(loop: Loop) -> frozenset[int]:
    """Return the trials that are paused, but not by the user."""
    paused = {trial.number for trial in loop.records.unfinished() if trial.state is TrialState.PAUSED}
    return frozenset(paused - loop.user.paused_trials)


def stop_least_promising(loop: Loop) -> bool:
    """Stop the paused trial that promises least, whose checkpoint takes the room that others need.

    Returns False, changing nothing, if fewer than two are paused: the study waits for room then.
    """
    paused = paused_at_rungs(loop)
    choice = next_step(loop, paused, may_start=False).choice if len(paused) > 1 else None
    if choice is None or not choice.of_curves:
        return False
    worst = min(choice.of_curves, key=lambda trial: (choice.of_curves[trial].gain, -trial))
    message = "the disk has no room for another checkpoint, and of the paused trials it promised least"
    loop.records.set_state(worst, TrialState.STOPPED, message=message, now=loop.runner.now())
    loop.records.tidy_checkpoints(loop.run.output_dir, keep_best=loop.run.keep_best)
    loop.observe(TrialEnded(record=loop.records.trial(worst)))
    return True


def is_worth(worth: Worth, choice: Choice) -> bool:
    """Whether what a trial may still gain stands out of the noise of an evaluation."""
    return worth.gain >= max(_LEAST_GAIN * choice.noise, _LEAST_LOG_LOSS)
