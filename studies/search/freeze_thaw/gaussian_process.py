"""A Gaussian process over settings and the shares of runs: what a trial will end at.

After Swersky et al., "Freeze-Thaw Bayesian Optimization" (2014), with the curve as Brownian motion instead of
a mixture of exponentials, so that mean and covariance are exact and need no approximation.  On the scale of
`curves.Scale`, with u = how much runs still have to fall (`Scale.left`) as the motion's time:

    y(trial, u) = c + f(x) + e(trial) + g(trial, u) + noise
    g(trial, u) = m(u) + h(x, u) + w(trial, u),   each 0 at the end of the run (u = 0)

f and h have a Matern 5/2 kernel with one length scale per feature; m is what all curves have in common beyond
the scale's trend, h what those of similar settings have, w what is a trial's own.  Each goes up with u as a
straight line plus Brownian motion: min(u, u') + u u' / 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize

from autosft.studies.search.freeze_thaw.curves import Floats, Integers, Points

#: Variance of the level c, wide, and of the shape m, since the scale has taken off most of it.
_LEVEL, _SHAPE = 4.0, 0.03
_JITTER = 1e-6
_ROOT_5 = 5**0.5
#: Points that the variances and length scales are fitted to; all points are conditioned on.
MAX_FITTED = 90
#: Shares of an earlier study's likeness that its effects may be alike by; with the last one they are fitted.
_ALIKE = (0.0, 0.5, 0.9)
#: Log likelihood by which a smaller one of them has to be better than the next.
_BELIEVED = 1.0
_MAX_ITERATIONS = 12


@dataclass(frozen=True, slots=True)
class Prior:
    """A log-normal prior of a parameter."""

    median: float
    log_sd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Priors:
    """Priors of the process's parameters.  The variances are on the scale of `curves.Scale`.

    Medians from fits to 30 trials of each of six tables (benchmarks/replay), which agree within a factor of
    three but for the variance of the settings.
    """

    settings: Prior = Prior(0.25, 0.8)  # of f
    shape_of_settings: Prior = Prior(0.1, 0.7)  # of h, per unit of u
    shape_of_trial: Prior = Prior(0.01, 1.0)  # of w, per unit of u
    trial: Prior = Prior(0.004, 0.8)  # of e: seeds, and settings that matter at no length scale
    noise: Prior = Prior(0.0005, 1.0)  # of one evaluation
    lengths: tuple[Prior, ...]  # per feature

    def all(self) -> tuple[Prior, ...]:
        own = (self.settings, self.shape_of_settings, self.shape_of_trial, self.trial, self.noise)
        return (*own, *self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The process's parameters: variances as in `Priors`, and length scales."""

    settings: float
    shape_of_settings: float
    shape_of_trial: float
    trial: float
    noise: float
    lengths: Floats
    alike: tuple[float, ...] = ()  # correlation of the effects of settings in each earlier study with these

    def between_studies(self, study: Integers, other: Integers) -> Floats:
        """Return the correlation of the effects of settings, 1 within a study."""
        if not self.alike:
            return np.ones((len(study), len(other)))
        share = np.array([1.0, *self.alike])
        product: Floats = share[study][:, None] * share[other][None, :]
        return np.where(study[:, None] == other[None, :], 1.0, product)

    @classmethod
    def from_logs(cls, logs: Floats, alike: tuple[float, ...] = ()) -> Parameters:
        values = np.exp(logs)
        names = ("settings", "shape_of_settings", "shape_of_trial", "trial", "noise")
        return cls(
            **{name: float(values[at]) for at, name in enumerate(names)},
            lengths=values[len(names) :],
            alike=alike,
        )


def fit(points: Points, priors: Priors, likeness: Sequence[float] = ()) -> Parameters:
    """Return the most probable parameters, from at most MAX_FITTED points.

    From fixed starting values, so that the same points give the same parameters.  Of earlier studies with
    some `likeness` each, how alike the effects of settings are is chosen last, among shares of it.
    """
    prior = priors.all()
    means = np.log([each.median for each in prior])
    sds = np.array([each.log_sd for each in prior])
    used = points.at_most(MAX_FITTED)
    alike = tuple(_ALIKE[-1] * each for each in likeness)
    if used.number < 3:
        return Parameters.from_logs(means, alike)
    fixed = _Fixed.of(used)

    def loss(logs: Floats) -> tuple[float, Floats]:
        value, gradient = _negative_log_likelihood(logs, used, fixed, alike)
        off = (logs - means) / sds
        return value + 0.5 * float(off @ off), gradient + off / sds

    found = minimize(
        loss,
        means,
        jac=True,
        method="L-BFGS-B",
        bounds=[(mean - 3 * sd, mean + 3 * sd) for mean, sd in zip(means, sds, strict=True)],
        options={"maxiter": _MAX_ITERATIONS},
    )
    logs = np.asarray(found.x)
    for number in range(len(likeness)):
        shares = [(*alike[:number], share * likeness[number], *alike[number + 1 :]) for share in _ALIKE]
        losses = [_negative_log_likelihood(logs, used, fixed, each)[0] for each in shares]
        # What is measured here has to speak against an earlier study before it counts less.
        alike = shares[max(range(len(shares)), key=lambda at: _BELIEVED * at - losses[at])]
    return Parameters.from_logs(logs, alike)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fixed:
    """What the likelihood needs of points and does not depend on parameters."""

    grows: Floats
    same_trial: Floats
    constant: Floats
    centred: Floats

    @classmethod
    def of(cls, points: Points) -> _Fixed:
        grows = _grows(points.left, points.left)
        return cls(
            grows=grows,
            same_trial=(points.trial[:, None] == points.trial[None, :]).astype(float),
            constant=_LEVEL * (points.study[:, None] == points.study[None, :])
            + _SHAPE * grows
            + np.diag(points.noise + _JITTER),
            centred=points.features - points.features.mean(axis=0),
        )


def _negative_log_likelihood(
    logs: Floats, points: Points, fixed: _Fixed, alike: tuple[float, ...] = ()
) -> tuple[float, Floats]:
    now = Parameters.from_logs(logs, alike)
    between = now.between_studies(points.study, points.study)
    scaled = fixed.centred / now.lengths
    distance = _distances(scaled, scaled)
    decay = np.exp(-_ROOT_5 * distance)
    kernel = (1 + _ROOT_5 * distance + 5 / 3 * distance**2) * decay
    of_settings = now.settings * between + now.shape_of_settings * fixed.grows
    of_trial = now.shape_of_trial * fixed.grows + now.trial
    covariance = fixed.constant + of_settings * kernel + of_trial * fixed.same_trial
    covariance.flat[:: points.number + 1] += now.noise
    try:
        factor = cholesky(covariance, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        return 1e10, np.zeros_like(logs)
    target = points.scaled - points.scaled.mean()
    weights = cho_solve((factor, True), target, check_finite=False)
    value = 0.5 * float(target @ weights) + float(np.log(factor.diagonal()).sum())
    inverse, _ = dpotri(factor, lower=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    slope = np.outer(weights, weights) - inverse
    by_kernel = slope * kernel
    by_trial = slope * fixed.same_trial
    by_length = slope * of_settings * (5 / 3 * (1 + _ROOT_5 * distance) * decay)
    moved = 2 * ((scaled**2 * by_length.sum(axis=1)[:, None]).sum(axis=0))
    moved -= 2 * (scaled * (by_length @ scaled)).sum(axis=0)
    gradient = np.array(
        [
            now.settings * (by_kernel * between).sum(),
            now.shape_of_settings * (by_kernel * fixed.grows).sum(),
            now.shape_of_trial * (by_trial * fixed.grows).sum(),
            now.trial * by_trial.sum(),
            now.noise * slope.trace(),
            *moved,
        ]
    )
    return value, -0.5 * gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """The process given points."""

    points: Points
    parameters: Parameters
    factor: Floats  # lower Cholesky factor of the points' covariance
    weights: Floats
    centre: float

    def at(self, features: Floats, trial: Floats, left: Floats) -> tuple[Floats, Floats]:
        """Return mean and variance of trials at u = `left`, without the noise of an evaluation.

        `trial` are the numbers in the points; a negative one is of a trial that has no point.
        """
        now = self.parameters
        across = self._between(features, trial, left)
        mean = self.centre + across @ self.weights
        known = solve_triangular(self.factor, across.T, lower=True, check_finite=False)
        shape = _SHAPE + now.shape_of_settings + now.shape_of_trial
        own = _LEVEL + now.settings + now.trial + shape * (left + left**2 / 5)
        return mean, np.maximum(own - (known**2).sum(axis=0), 1e-12)

    def mean_of_settings(self, features: Floats) -> Floats:
        """Return the mean at the end of runs with settings, of no trial in particular."""
        none = np.full(len(features), -1)
        mean: Floats = self.at(features, none, np.zeros(len(features)))[0]
        return mean

    def sd_of_difference(self, one: Floats, other: Floats) -> float:
        """Return the standard deviation of the difference of two settings at the end of a run."""
        both = np.stack([one, other])
        none = np.full(2, -1)
        across = self._between(both, none, np.zeros(2))
        known = solve_triangular(self.factor, across.T, lower=True, check_finite=False)
        kernel = _matern(_distances(both / self.parameters.lengths, both / self.parameters.lengths))[0, 1]
        before = 2 * self.parameters.settings * (1 - float(kernel))
        return math.sqrt(max(before - float(((known[:, 0] - known[:, 1]) ** 2).sum()), 0.0))

    def with_believed(self, features: Floats, trial: Floats, left: Floats) -> Posterior:
        """Return the process given its own prediction as further points, of trials that run now.

        The mean stays as it is; what will be known soon is not worth learning twice ("kriging believer",
        Ginsbourger et al. 2010).
        """
        mean, _ = self.at(features, trial, left)
        believed = Points(
            features=features,
            trial=trial.astype(np.int64),
            left=left,
            scaled=mean,
            noise=np.zeros(len(mean)),
            study=np.zeros(len(mean), dtype=np.int64),
        )
        return condition(self.points.with_more(believed), self.parameters)

    def _between(self, features: Floats, trial: Floats, left: Floats) -> Floats:
        now = self.parameters
        distance = _distances(features / now.lengths, self.points.features / now.lengths)
        kernel = _matern(distance)
        grows = _grows(left, self.points.left)
        same = trial[:, None] == self.points.trial[None, :]
        between = now.between_studies(np.zeros(len(left), dtype=np.int64), self.points.study)
        of_settings = now.settings * between + now.shape_of_settings * grows
        covariance: Floats = (
            _LEVEL * (self.points.study == 0)[None, :] + _SHAPE * grows + of_settings * kernel
        )
        covariance += same * (now.shape_of_trial * grows + now.trial)
        return covariance


def condition(points: Points, parameters: Parameters) -> Posterior:
    """Return the process given points.  At 1,500 points this takes about 0.1 s."""
    fixed = _Fixed.of(points)
    scaled = points.features / parameters.lengths
    kernel = _matern(_distances(scaled, scaled))
    between = parameters.between_studies(points.study, points.study)
    of_settings = parameters.settings * between + parameters.shape_of_settings * fixed.grows
    covariance = fixed.constant + of_settings * kernel
    covariance += (parameters.shape_of_trial * fixed.grows + parameters.trial) * fixed.same_trial
    covariance.flat[:: points.number + 1] += parameters.noise
    factor = cholesky(covariance, lower=True, check_finite=False)
    centre = float(points.scaled.mean())
    weights = cho_solve((factor, True), points.scaled - centre, check_finite=False)
    return Posterior(points=points, parameters=parameters, factor=factor, weights=weights, centre=centre)


def _grows(left: Floats, other: Floats) -> Floats:
    product: Floats = left[:, None] * other[None, :]
    return np.minimum(left[:, None], other[None, :]) + product / 5


def _distances(one: Floats, other: Floats) -> Floats:
    square = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :] - 2 * one @ other.T
    found: Floats = np.sqrt(np.maximum(square, 0.0))
    return found


def _matern(distance: Floats) -> Floats:
    return (1 + _ROOT_5 * distance + 5 / 3 * distance**2) * np.exp(-_ROOT_5 * distance)
