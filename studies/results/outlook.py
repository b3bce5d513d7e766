"""What a study's learning curves say, for people: predicted ends, the effect of each setting, going on.

From the model that chooses (`choose`), given all that was measured.  Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autosft.studies.formatting import format_number
from autosft.studies.search.dimensions import Choices, Dimension, Fixed, Range, Value
from autosft.studies.search.freeze_thaw.choose import limited_threads, model_of
from autosft.studies.search.freeze_thaw.curves import Curve, Scale
from autosft.studies.search.freeze_thaw.features import Features
from autosft.studies.search.freeze_thaw.gaussian_process import Posterior
from autosft.studies.search.freeze_thaw.proposal import Rules, as_value, curves_of, decide_next
from autosft.studies.search.space import active
from autosft.studies.trial import TrialRecord, TrialState
from autosft.studies.values import Direction, StudySpec

#: With fewer measured trials, what the model says of a setting is its prior.
MIN_TRIALS = 8
#: Values of a number that are compared, over its range.
_NUM_VALUES = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """How much a setting matters: its best value against its worst, all others as in the best trial.

    `worse` is by what share the predicted loss is higher (of a metric to maximise, 1 - metric), with its 95 %
    interval.  The two values are the extremes of the model's mean, which flatters the difference a little.
    """

    name: str
    best: Value
    worst: Value
    worse: float
    low: float
    high: float

    @property
    def is_seen(self) -> bool:
        """Whether the interval is above no effect."""
        return self.low > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictedEnd:
    """What a trial that did not run to its end would have ended at, in the study's metric."""

    end: float
    low: float  # 95 % interval, low < high
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GoingOn:
    """What more search promises: the expected improvement of the most promising new settings."""

    gain: float  # in log loss
    noise: float  # standard deviation between seeds, as far as the model knows it, in log loss

    @property
    def is_worth_it(self) -> bool:
        return self.gain >= self.noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a study's curves say; everything is empty where too little was measured."""

    effects: tuple[Effect, ...] = ()  # the largest first
    ends: tuple[tuple[int, PredictedEnd], ...] = ()  # of trials that were paused or stopped
    going_on: GoingOn | None = None


def rules_of(spec: StudySpec) -> Rules:
    """Return what a study's decisions depend on besides its trials and earlier studies."""
    return Rules(
        space=spec.space,
        metric=spec.metric,
        minimize=spec.direction is Direction.MINIMIZE,
        num_evaluations=spec.pinned.num_evaluations,
        seed=spec.seed,
    )


def outlook_of(rules: Rules, trials: Sequence[TrialRecord]) -> Outlook:
    """Return what the curves of a study say."""
    measured = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    if len(measured) < MIN_TRIALS:
        return Outlook()
    features = Features.over(rules.space.searched())
    curves = curves_of(rules, trials, features=features, paused=())
    settled = [each for each in curves if each.values]
    with limited_threads():
        scale = Scale.of(settled)
        model = model_of(settled, features.priors(), scale)
        sign = 1 if rules.minimize else -1
        best = min(measured, key=lambda trial: sign * (trial.value or 0.0))
        return Outlook(
            effects=_effects(rules, model, scale, features, dict(best.parameters)),
            ends=_ends(rules, trials, settled, model, scale),
            going_on=_going_on(rules, trials),
        )


def _effects(
    rules: Rules, model: Posterior, scale: Scale, features: Features, best: Mapping[str, Value]
) -> tuple[Effect, ...]:
    found = []
    searched = rules.space.searched()
    for name in active(rules.space, dict(best)):
        if name not in searched or len(values := _values(searched[name])) < 2:
            continue
        points = np.array([features.of({**best, name: value}) for value in values])
        mean = model.mean_of_settings(points)
        low_at, high_at = int(np.argmin(mean)), int(np.argmax(mean))
        sd = model.sd_of_difference(points[low_at], points[high_at])
        difference = float(mean[high_at] - mean[low_at])
        floor = scale.loss(float(mean[low_at]))
        worse, low, high = (
            scale.loss(float(mean[low_at]) + each) / floor - 1
            for each in (difference, difference - 1.96 * sd, difference + 1.96 * sd)
        )
        found.append(
            Effect(name=name, best=values[low_at], worst=values[high_at], worse=worse, low=low, high=high)
        )
    return tuple(sorted(found, key=lambda effect: -effect.worse))


def _values(dimension: Dimension) -> list[Value]:
    if isinstance(dimension, Choices):
        return list(dimension.values)
    if isinstance(dimension, Fixed):
        return [dimension.value]
    return list(dict.fromkeys(_numbers(dimension)))


def _numbers(dimension: Range) -> list[float]:
    low, high = dimension.low, dimension.top
    shares = [step / (_NUM_VALUES - 1) for step in range(_NUM_VALUES)]
    if dimension.log:
        numbers = [low * (high / low) ** share for share in shares]
    else:
        numbers = [low + (high - low) * share for share in shares]
    return [dimension.nearest(float(f"{number:.3g}")) for number in numbers]


def _ends(
    rules: Rules, trials: Sequence[TrialRecord], curves: Sequence[Curve], model: Posterior, scale: Scale
) -> tuple[tuple[int, PredictedEnd], ...]:
    unfinished = (TrialState.PAUSED, TrialState.STOPPED, TrialState.RUNNING, TrialState.WAITING)
    states = {trial.number: trial.state for trial in trials}
    at = [
        index
        for index, curve in enumerate(curves)
        if curve.share < 1 and not curve.has_diverged and states[curve.key] in unfinished
    ]
    if not at:
        return ()
    mean, variance = model.at(
        np.array([curves[index].features for index in at]), np.array(at), np.zeros(len(at))
    )
    is_share = all((trial.value or 0.0) <= 1 for trial in trials)
    found = []
    for index, middle, spread in zip(at, mean, np.sqrt(variance), strict=True):
        end, *ends = (
            as_value(scale.loss(float(middle + each * spread)), minimize=rules.minimize, is_share=is_share)
            for each in (0.0, -1.96, 1.96)
        )
        found.append((curves[index].key, PredictedEnd(end=end, low=min(ends), high=max(ends))))
    return tuple(found)


def _going_on(rules: Rules, trials: Sequence[TrialRecord]) -> GoingOn | None:
    choice = decide_next(rules, trials, paused=(), may_start=True).choice
    if choice is None or choice.of_candidate is None:
        return None
    return GoingOn(gain=choice.of_candidate.gain, noise=choice.seed_noise)


# Text


def describe_going_on(going_on: GoingOn | None) -> str:
    """Say what more search promises; empty if that is not known."""
    if going_on is None:
        return ""
    gain, noise = (f"{100 * math.expm1(each):.2g} %" for each in (going_on.gain, going_on.noise))
    promise = f"the most promising new settings are expected to lower the loss by {gain}"
    if going_on.is_worth_it:
        return f"worth it: {promise}, and the noise between seeds is {noise}"
    return f"not worth it: {promise}, within the noise between seeds, {noise}"


def effect_rows(effects: Sequence[Effect]) -> list[tuple[str, str, str, str]]:
    """Return effects as rows of text: setting, best value, worst value, how much worse with its interval."""
    return [
        (
            effect.name.replace("_", " "),
            _shown(effect.best),
            _shown(effect.worst),
            f"{100 * effect.worse:.2g} % ({100 * effect.low:.2g} to {100 * effect.high:.2g})"
            if effect.is_seen
            else f"none seen ({100 * effect.low:.2g} to {100 * effect.high:.2g} %)",
        )
        for effect in effects
    ]


def _shown(value: Value) -> str:
    return format_number(value) if isinstance(value, float) else str(value)
