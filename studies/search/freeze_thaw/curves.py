"""Learning curves as the search sees them, and the scale on which it compares losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

#: Points of one curve that the model is given: the first, the last, and some in between.
MAX_POINTS = 4
#: Trials of an earlier study that the model is given: its best, and others evenly.
MAX_EARLIER = 32
#: Variance of where a run of an earlier study would have ended, per unit of what was left of it.
_STOPPED_NOISE = 0.1
#: Apart from trials of this study, so that no two are the same.
_APART = 1_000_000
#: Of the median trial over the best one, in log loss, where fewer trials than _NUM_KNOWN are measured; where
#: they are, a tenth of it.
_LEAST_SPREAD, _NUM_KNOWN = 0.1, 4
#: Weights of a trend.
_NUM_TREND = 4
#: What a run is taken to fall at least, per unit of -log(share), on the scale.
_LEAST_FALL = 0.05
#: How far beyond the median trial a diverged run is, on the scale of `Scale`.
DIVERGED = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A trial's settings and its losses so far.

    `values` are positive and smaller is better (a loss, an error rate); NaN or infinity means diverged.
    """

    key: int  # identifies the trial; ties are decided by it
    features: tuple[float, ...]  # `features.Features.of`
    shares: tuple[float, ...] = ()  # of the trial's full run, ascending, at which `values` were measured
    values: tuple[float, ...] = ()
    next_share: float | None = None  # of its next evaluation; None: over, whatever the reason
    is_running: bool = False  # its next evaluation is being worked on
    cost: float = 1.0  # of its full run, in full runs

    @property
    def share(self) -> float:
        """The share of its run that it has been trained for."""
        return self.shares[-1] if self.shares else 0.0

    @property
    def has_diverged(self) -> bool:
        return bool(self.values) and not _is_usable(self.values[-1])

    def best_until(self, at: int) -> float:
        """Return the best value up to the `at`-th (negative: from the end); NaN if all have diverged."""
        upto = self.values[: at + 1 if at >= 0 else len(self.values) + at + 1]
        return min((value for value in upto if _is_usable(value)), default=math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What another study measured, with features as this study has them; losses are on a scale of its own."""

    curves: tuple[Curve, ...]
    likeness: float  # 0..1, of its model and data with this study's


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps log losses to a scale on which the best loss measured so far is 0 at the end of a run.

    What curves have in common is taken off: the loss of an unfinished run is mapped to what it would end at
    if it went on like the others (`trend`).  The unit is the distance of the median trial from the best one.
    What is worse than the median matters little, however much worse it is: beyond it the scale is
    logarithmic, and it ends at DIVERGED beyond the median.

    The loss of a trial at a share is its best so far: the best checkpoint is what a run is worth.
    """

    best: float  # log loss, measured anywhere
    spread: float  # of the median trial over the best one, in log loss
    median: float  # where the median trial is on the scale
    trend: tuple[float, ...]  # how much log losses still fall: weights of `_basis` at a share

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> Scale:
        """Return the scale of what was measured so far."""
        usable = [curve for curve in curves if curve.values and not curve.has_diverged]
        every = [math.log(value) for curve in curves for value in curve.values if _is_usable(value)]
        if not usable:
            return cls(best=min(every, default=0.0), spread=1.0, median=0.0, trend=(0.0,) * _NUM_TREND)
        trend, best = _trend(usable), min(every)
        ends = [math.log(curve.best_until(-1)) - _at(trend, curve.share) for curve in usable]
        middle = float(np.median(ends))
        least = _LEAST_SPREAD if len(ends) < _NUM_KNOWN else _LEAST_SPREAD / 10
        spread = max(middle - min(ends), least)
        return cls(best=best, spread=spread, median=(middle - best) / spread, trend=trend)

    def __call__(self, value: float, share: float = 1.0) -> float:
        """Return where a loss at a share of a run is on the scale."""
        if not _is_usable(value):
            return self.median + DIVERGED
        scaled = (math.log(value) - _at(self.trend, share) - self.best) / self.spread
        over = scaled - self.median
        return scaled if over <= 0 else self.median + min(math.log1p(over), DIVERGED)

    def left(self, shares: Floats) -> Floats:
        """Return how much of their fall runs have still ahead of them, on the scale; 0 at their ends.

        This is the time in which the model's curves move: how far apart runs get that were level goes with
        how much they still fall, on every table of curves that we know (docs/search.md).
        """
        fall: Floats = _basis(shares) @ np.array(self.trend) / self.spread
        return fall + _LEAST_FALL * _basis(shares)[:, 0]

    def gain(self, scaled: float) -> float:
        """Return a difference below the median, on the scale, as a difference of log losses."""
        return scaled * self.spread

    def loss(self, scaled: float) -> float:
        """Return the loss at the end of a run that is at a place on the scale."""
        over = min(scaled - self.median, DIVERGED)
        linear = scaled if over <= 0 else self.median + math.expm1(over)
        return math.exp(self.best + self.spread * linear)


def _at(trend: Sequence[float], share: float) -> float:
    return float(_basis(np.array([share]))[0] @ np.array(trend))


def _basis(shares: Floats) -> Floats:
    """Return what a trend is made of: power laws and schedules that end, each 0 at the end of a run."""
    left = -np.log(np.clip(shares, 1 / 64, 1.0))
    return np.stack([left, left**2, 1 - shares, (1 - shares) ** 2], axis=1)


def _trend(curves: Sequence[Curve]) -> tuple[float, ...]:
    """Return how log losses fall towards the end of a run, from the steps of all curves.

    A regression without negative weights in which steps count less the further they are from the others
    (Huber 1964), and those of the worse half of the trials a tenth: what learns nothing does not fall.
    """
    steps = [
        (index, before, after, math.log(curve.best_until(at) / curve.best_until(at + 1)))
        for index, curve in enumerate(curves)
        for at, (before, after) in enumerate(zip(curve.shares, curve.shares[1:], strict=False))
        if _is_usable(curve.best_until(at))
    ]
    if not steps:
        return (0.0,) * _NUM_TREND
    of_trial = np.array([step[0] for step in steps])
    basis = _basis(np.array([step[1] for step in steps])) - _basis(np.array([step[2] for step in steps]))
    drop = np.array([step[3] for step in steps])
    last = np.array([math.log(curve.best_until(-1)) for curve in curves])
    at_last = _basis(np.array([curve.share for curve in curves]))
    ridge = np.sqrt(1e-5) * np.eye(_NUM_TREND)
    close, good = np.ones(len(drop)), np.ones(len(curves))
    found = np.zeros(_NUM_TREND)
    for _ in range(5):
        weight = np.sqrt(close * good[of_trial])
        rows = np.vstack([basis * weight[:, None], ridge])
        found, _ = nnls(rows, np.concatenate([drop * weight, np.zeros(_NUM_TREND)]))
        off = np.abs(drop - basis @ found)
        close = 1 / np.maximum(1.0, off / (1.5 * np.median(off) + 1e-9))
        ends = last - at_last @ found
        good = np.where(ends <= np.median(ends), 1.0, 0.1)
    return tuple(map(float, found))


def _is_usable(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Points of curves as arrays of one length."""

    features: Floats  # (points, features)
    trial: Integers  # which curve each belongs to
    left: Floats  # `Scale.left`: 0 at the end of a run
    scaled: Floats  # on the scale of `Scale`
    noise: Floats  # variance that is known to be a point's own
    study: Integers  # 0: this one, then the earlier ones

    def select(self, rows: Integers) -> Points:
        """Return some of the points, in their order."""
        return Points(**{each.name: getattr(self, each.name)[rows] for each in fields(self)})

    def with_more(self, more: Points) -> Points:
        """Return these points and others."""
        return Points(
            **{
                each.name: np.concatenate([getattr(self, each.name), getattr(more, each.name)])
                for each in fields(self)
            }
        )

    def at_most(self, number: int) -> Points:
        """Return so many points: the last of each trial, then the one before it, and so on.

        Of more trials than that, the best ones for half of the number, and the others evenly.
        """
        if self.number <= number:
            return self
        place = self._places()
        lasts = np.flatnonzero(place == 0)
        if len(lasts) <= number:
            return self.select(np.sort(np.lexsort((np.arange(self.number), place))[:number]))
        by_value = lasts[np.argsort(self.scaled[lasts], kind="stable")]
        half = number // 2
        evenly = np.linspace(half, len(lasts) - 1, number - half).astype(np.int64)
        return self.select(np.sort(by_value[[*range(half), *evenly]]))

    def _places(self) -> Integers:
        """Return the place of each point in its trial, counted from the trial's last."""
        order = np.lexsort((self.left, self.trial))
        place = np.zeros(self.number, dtype=np.int64)
        for before, here in pairwise(order):
            place[here] = place[before] + 1 if self.trial[here] == self.trial[before] else 0
        return place

    @property
    def number(self) -> int:
        return len(self.scaled)


def points_of(curves: Sequence[Curve], scale: Scale, *, max_points: int = MAX_POINTS) -> Points:
    """Return the points of curves that the model is given, in the order of the curves."""
    rows = [
        (index, curve.shares[at], scale(curve.best_until(at), curve.shares[at]))
        for index, curve in enumerate(curves)
        for at in _chosen(len(curve.shares), max_points)
    ]
    trial = np.array([row[0] for row in rows], dtype=np.int64)
    scaled = np.array([row[2] for row in rows])
    width = len(curves[0].features) if curves else 0
    features = np.array([curves[index].features for index in trial], dtype=float).reshape(len(rows), width)
    return Points(
        features=features,
        trial=trial,
        left=scale.left(np.array([row[1] for row in rows])),
        scaled=scaled,
        # A run that goes wrong says little of its neighbours: a quarter of good settings may do so by chance.
        noise=0.25 * np.maximum(scaled - scale.median, 0.0) ** 2,
        study=np.zeros(len(rows), dtype=np.int64),
    )


def points_of_earlier(earlier: Sequence[Earlier]) -> Points | None:
    """Return the ends of runs of earlier studies as points, each study on a scale of its own.

    Where a run would have ended that was stopped is known with noise.
    """
    found: Points | None = None
    for number, study in enumerate(earlier, start=1):
        scale = Scale.of(study.curves)
        points = points_of(study.curves, scale, max_points=1).at_most(MAX_EARLIER)
        own = replace(
            points,
            trial=points.trial + number * _APART,
            left=np.zeros(points.number),
            noise=points.noise + _STOPPED_NOISE * points.left,
            study=np.full(points.number, number, dtype=np.int64),
        )
        found = own if found is None else found.with_more(own)
    return found


def _chosen(number: int, most: int) -> list[int]:
    """Return the places of at most so many points of a curve: its last, its first, and evenly in between."""
    if number <= most:
        return list(range(number))
    if most == 1:
        return [number - 1]
    return sorted({round(at * (number - 1) / (most - 1)) for at in range(most)})
