"""The decision at a free slot: go on with a trial, or start a new one.

Pure: no clock, no file, no randomness.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from autosft.studies.search.freeze_thaw.curves import (
    Curve,
    Earlier,
    Floats,
    Scale,
    points_of,
    points_of_earlier,
)
from autosft.studies.search.freeze_thaw.gaussian_process import Posterior, Priors, condition, fit

#: Points that the model is conditioned on; if there are more, curves are thinned to two points each.
MAX_CONDITIONED = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Settings that could be started."""

    features: Floats  # (candidates, features)
    first_share: float  # of a run, at which it is evaluated first
    costs: Floats | None = None  # of their full runs, in full runs; None: 1 each


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """What training on one trial promises."""

    end: float  # predicted loss at its end
    low: float  # 95 % interval of it
    high: float
    gain: float  # expected improvement on the best so far, in log loss
    cost: float  # expected, in full runs: the next evaluation, and the rest if it is worth that
    per_cost: float  # gain over cost, which is what decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What training on each trial is worth, and which is worth most.

    `curve` is the key of the trial to go on with, None to start `candidate`, an index into the candidates.
    """

    curve: int | None
    candidate: int | None  # the best of them, also where a trial is worth more; None if there is none
    of_curves: Mapping[int, Worth]
    of_candidate: Worth | None
    noise: float  # standard deviation of an evaluation, in log loss
    seed_noise: float  # of runs with the same settings and other seeds

    @property
    def worth(self) -> Worth | None:
        """What is chosen is worth this."""
        return self.of_candidate if self.curve is None else self.of_curves[self.curve]


def choose(
    curves: Sequence[Curve], candidates: Candidates, *, priors: Priors, earlier: Sequence[Earlier] = ()
) -> Choice | None:
    """Return what a free slot does next; None if nothing was measured, or there is nothing to choose from.

    The worth of a trial is the expected improvement of its predicted end on the best loss that has been
    measured anywhere, over what it is expected to cost.  Trials that run now count as if they had been
    measured to be what is predicted, so that several slots do not do the same.  Ties go to trials, and to
    lower keys.
    """
    if not any(curve.values for curve in curves):
        return None
    with limited_threads():
        return _choose(curves, candidates, priors, earlier)


def limited_threads() -> contextlib.AbstractContextManager[object]:
    """Return a context in which BLAS computes with one thread."""
    limited: contextlib.AbstractContextManager[object] = _threads().limit(limits=1)
    return limited


@functools.cache
def _threads() -> ThreadpoolController:
    """Limits the threads of BLAS: for matrices as small as these they wait for each other, on busy cores."""
    return ThreadpoolController()


def _choose(
    curves: Sequence[Curve], candidates: Candidates, priors: Priors, earlier: Sequence[Earlier]
) -> Choice | None:
    scale = Scale.of(curves)
    model = model_of(curves, priors, scale, earlier)
    paused = [(at, curve) for at, curve in enumerate(curves) if _can_go_on(curve)]
    num_new = len(candidates.features)
    if not paused and not num_new:
        return None
    width = len(curves[0].features)
    own = np.array([curve.features for _, curve in paused], dtype=float).reshape(len(paused), width)
    new_features = np.asarray(candidates.features, dtype=float).reshape(num_new, width)
    features = np.vstack([own, new_features])
    trial = np.array([at for at, _ in paused] + [-1] * num_new)
    mean, variance = model.at(features, trial, np.zeros(len(trial)))
    costs = np.ones(num_new) if candidates.costs is None else candidates.costs
    full = np.concatenate([np.array([curve.cost for _, curve in paused]), costs])
    here = np.array([curve.share for _, curve in paused] + [0.0] * num_new)
    after = np.array(
        [curve.next_share for _, curve in paused] + [candidates.first_share] * num_new, dtype=float
    )
    gain, cost = _gain_and_cost(mean, np.sqrt(variance), (after - here) * full, (1 - after) * full)
    per_cost = gain / cost

    def worth(at: int) -> Worth:
        sd = float(variance[at]) ** 0.5
        return Worth(
            end=scale.loss(float(mean[at])),
            low=scale.loss(float(mean[at]) - 1.96 * sd),
            high=scale.loss(float(mean[at]) + 1.96 * sd),
            gain=scale.gain(float(gain[at])),
            cost=float(cost[at]),
            per_cost=scale.gain(float(per_cost[at])),
        )

    best = int(np.argmax(per_cost))
    new = len(paused) + int(np.argmax(per_cost[len(paused) :])) if num_new else None
    return Choice(
        curve=paused[best][1].key if best < len(paused) else None,
        candidate=None if new is None else new - len(paused),
        of_curves={curve.key: worth(at) for at, (_, curve) in enumerate(paused)},
        of_candidate=None if new is None else worth(new),
        noise=scale.gain(model.parameters.noise**0.5),
        seed_noise=scale.gain((model.parameters.noise + model.parameters.trial) ** 0.5),
    )


def model_of(
    curves: Sequence[Curve], priors: Priors, scale: Scale, earlier: Sequence[Earlier] = ()
) -> Posterior:
    """Return the model of what was measured, here and in earlier studies, and of what is being measured."""
    points = points_of(curves, scale)
    if points.number > MAX_CONDITIONED:
        points = points_of(curves, scale, max_points=2)
    if (others := points_of_earlier(earlier)) is not None:
        points = points.with_more(others)
    posterior = condition(points, fit(points, priors, [each.likeness for each in earlier]))
    running = [(at, curve) for at, curve in enumerate(curves) if curve.is_running]
    if not running:
        return posterior
    return posterior.with_believed(
        np.array([curve.features for _, curve in running]),
        np.array([at for at, _ in running]),
        scale.left(np.array([curve.next_share or 1.0 for _, curve in running])),
    )


def _can_go_on(curve: Curve) -> bool:
    return curve.next_share is not None and not curve.is_running and not curve.has_diverged


def _gain_and_cost(mean: Floats, sd: Floats, step: Floats, rest: Floats) -> tuple[Floats, Floats]:
    """Return expected improvements on the best so far, 0 on the scale, and expected costs.

    A trial that turns out to improve on it runs to its end; another is paused at its next evaluation.
    """
    away = -mean / sd
    chance = ndtr(away)
    gain = sd * (away * chance + np.exp(-(away**2) / 2) / (2 * np.pi) ** 0.5)
    return np.maximum(gain, 1e-300), step + rest * chance
