"""From a study's records to the decision, and from the decision to a new trial's parameters.

A pure function of the records: a driver that was killed decides again as it did.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autosft.studies.search.dimensions import Choices, Dimension, Fixed, Range, Value
from autosft.studies.search.freeze_thaw.choose import Candidates, Choice, choose
from autosft.studies.search.freeze_thaw.curves import Curve, Earlier
from autosft.studies.search.freeze_thaw.features import Features
from autosft.studies.search.sampling import seed_for
from autosft.studies.search.settings import SETTINGS
from autosft.studies.search.space import SearchSpace, active
from autosft.studies.trial import TrialRecord, TrialState

#: Trials that are drawn at random before the model proposes any; queued ones count.
NUM_STARTUP = 4
#: The same where earlier studies are known.
NUM_STARTUP_KNOWN = 2
#: Settings that are drawn all over the space, and around each of the best trials, to choose a new trial from.
_NUM_ANYWHERE, _NUM_BEST, _NUM_AROUND = 256, 8, 8
#: Steps of the settings around a good trial: standard deviations in decades, and in ranges.
_STEP_DECADES, _STEP_RANGE = 0.15, 0.15

_Parameters = dict[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierStudy:
    """What a search learns from another study of the same metric."""

    name: str
    likeness: float  # 0..1
    num_evaluations: int  # of a run
    trials: tuple[TrialRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a study's decisions depend on besides its trials."""

    space: SearchSpace
    metric: str
    minimize: bool
    num_evaluations: int  # of a run, at equal shares of it
    seed: int
    earlier: tuple[EarlierStudy, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """What a free slot does: go on with `trial`, or if that is None, start `parameters`."""

    trial: int | None
    parameters: Mapping[str, Value] | None
    choice: Choice | None  # None: before anything was measured


def decide_next(
    rules: Rules, trials: Sequence[TrialRecord], *, paused: Collection[int], may_start: bool
) -> Next:
    """Return what a free slot does, with trials that are `paused` as those that can be gone on with.

    Trials that are neither paused nor over count as running: they will be measured without being chosen.
    """
    if may_start and len(trials) < (NUM_STARTUP_KNOWN if rules.earlier else NUM_STARTUP):
        return Next(trial=None, parameters=_drawn(rules, trials, 1)[0], choice=None)
    new = _candidates(rules, trials) if may_start else []
    features = Features.over(rules.space.searched())
    choice = choose(
        curves_of(rules, trials, features=features, paused=paused),
        Candidates(
            features=np.array([features.of(each) for each in new]),
            first_share=1 / rules.num_evaluations,
        ),
        priors=features.priors(),
        earlier=earlier_curves(rules, features),
    )
    if choice is None:
        return Next(trial=None, parameters=new[0] if new else None, choice=None)
    parameters = None if choice.candidate is None else new[choice.candidate]
    return Next(trial=choice.curve, parameters=parameters, choice=choice)


def curves_of(
    rules: Rules, trials: Sequence[TrialRecord], *, features: Features, paused: Collection[int]
) -> list[Curve]:
    """Return the curves of all trials but those that failed, which say nothing of their settings.

    A trial that did not fit counts as one that diverged: its neighbours may not fit either.
    """
    curves = []
    for trial in trials:
        if trial.state is TrialState.FAILED:
            continue
        measured = [
            (step.evaluation / rules.num_evaluations, as_loss(value, minimize=rules.minimize))
            for step in trial.measurements
            if step.evaluation is not None and (value := step.metric(rules.metric)) is not None
        ]
        if trial.state is TrialState.INFEASIBLE:
            measured = [(1.0, math.nan)]
        is_open = trial.number in paused or not trial.state.is_over
        done = measured[-1][0] if measured else 0.0
        curves.append(
            Curve(
                key=trial.number,
                features=features.of(dict(trial.parameters)),
                shares=tuple(share for share, _ in measured),
                values=tuple(loss for _, loss in measured),
                next_share=min(1.0, done + 1 / rules.num_evaluations) if is_open and done < 1 else None,
                is_running=is_open and trial.number not in paused,
            )
        )
    return curves


def earlier_curves(rules: Rules, features: Features) -> tuple[Earlier, ...]:
    """Return the curves of earlier studies; a setting that they did not search is in the middle."""
    found = []
    for study in rules.earlier:
        own = replace(rules, num_evaluations=study.num_evaluations)
        curves = curves_of(own, study.trials, features=features, paused=())
        if measured := tuple(curve for curve in curves if curve.values):
            found.append(Earlier(curves=measured, likeness=study.likeness))
    return tuple(found)


def as_loss(value: float, *, minimize: bool) -> float:
    """Return a positive number that is better the smaller it is; of a share to maximise, what is missing."""
    if minimize:
        return value
    return max(1 - value, 1e-4) if value <= 1 else 1 / value


def as_value(loss: float, *, minimize: bool, is_share: bool) -> float:
    """Return the value of the metric that `as_loss` made a loss of; `is_share` where it is at most 1."""
    if minimize:
        return loss
    return 1 - loss if is_share else 1 / loss


# New settings


def _candidates(rules: Rules, trials: Sequence[TrialRecord]) -> list[_Parameters]:
    """Return settings to choose a new trial from: all over the space, and around the best trials."""
    drawn = _drawn(rules, trials, _NUM_ANYWHERE)
    draw = random.Random(seed_for(rules.seed, len(trials)) + 1)
    scored = [
        (as_loss(trial.value, minimize=rules.minimize), trial.number)
        for trial in trials
        if trial.value is not None and math.isfinite(trial.value) and trial.state is not TrialState.INFEASIBLE
    ]
    for _, number in sorted(scored)[:_NUM_BEST]:
        own = dict(trials[number].parameters)
        drawn += [_near(rules.space, own, draw) for _ in range(_NUM_AROUND)]
    tried = {trial.parameters for trial in trials}
    fresh = {
        tuple(parameters.items()): parameters
        for parameters in drawn
        if tuple(parameters.items()) not in tried
    }
    return list(fresh.values()) or drawn[:1]  # repeated only if everything nearby has been tried


def _drawn(rules: Rules, trials: Sequence[TrialRecord], number: int) -> list[_Parameters]:
    draw = random.Random(seed_for(rules.seed, len(trials)))
    return [_near(rules.space, {}, draw) for _ in range(number)]


def _near(space: SearchSpace, own: Mapping[str, Value], draw: random.Random) -> _Parameters:
    """Draw settings around others, or anywhere for settings that these do not have."""
    drawn: _Parameters = {}
    searched = space.searched()
    for name in sorted(searched, key=lambda name: name != "method"):
        if name in active(space, drawn):
            value = _value_near(searched[name], own.get(name), draw)
            drawn[name] = int(value) if SETTINGS[name].is_whole else value
    return {name: drawn[name] for name in searched if name in drawn}


def _value_near(dimension: Dimension, own: Value | None, draw: random.Random) -> Value:
    if isinstance(dimension, Choices):
        stays = own in dimension.values and draw.random() < 0.8
        return own if stays and own is not None else draw.choice(dimension.values)
    if isinstance(dimension, Fixed):
        return dimension.value
    value = _number_near(dimension, None if own is None else float(own), draw)
    # Three digits: 3.48e-4 and 3.4812e-4 learn the same, and people copy these numbers.
    return dimension.nearest(value if dimension.step else float(f"{value:.3g}"))


def _number_near(dimension: Range, own: float | None, draw: random.Random) -> float:
    low, high = dimension.low, dimension.top
    if dimension.log:
        if own is not None:
            return float(own * 10 ** draw.gauss(0, _STEP_DECADES))
        return math.exp(draw.uniform(math.log(low), math.log(high)))
    if own is not None:
        return own + draw.gauss(0, _STEP_RANGE) * (high - low)
    return draw.uniform(low, high)
