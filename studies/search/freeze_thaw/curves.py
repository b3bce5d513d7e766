"""Learning curves as the search sees them, and the scale on which it compares losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: Points of one curve that the model is given: the first, the last, and some in between.
MAX_POINTS = 4
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps log losses to a scale on which the best loss measured so far is 0 at the end of a run.

    What curves have in common is taken off: the loss of an unfinished run is mapped to what it would end at
    if it went on like the others (`trend`).  The unit is the distance of the median trial from the best one.
    What is worse than the median matters little, however much worse it is: beyond it the scale is
    logarithmic, and it ends at DIVERGED beyond the median.
    """

    best: float  # log loss, measured anywhere
    spread: float  # of the median trial over the best one, in log loss
    median: float  # where the median trial is on the scale
    trend: tuple[float, float]  # of log losses: trend[0] x u + trend[1] x u^2, u = -log(share)

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> Scale:
        """Return the scale of what was measured so far."""
        usable = [curve for curve in curves if curve.values and not curve.has_diverged]
        every = [math.log(value) for curve in curves for value in curve.values if _is_usable(value)]
        if not usable:
            return cls(best=min(every, default=0.0), spread=1.0, median=0.0, trend=(0.0, 0.0))
        trend, best = _trend(usable), min(every)
        ends = [math.log(curve.values[-1]) - _at(trend, curve.share) for curve in usable]
        middle = float(np.median(ends))
        spread = max(middle - min(ends), 1e-4)
        return cls(best=best, spread=spread, median=(middle - best) / spread, trend=trend)

    def __call__(self, value: float, share: float = 1.0) -> float:
        """Return where a loss at a share of a run is on the scale."""
        if not _is_usable(value):
            return self.median + DIVERGED
        scaled = (math.log(value) - _at(self.trend, share) - self.best) / self.spread
        over = scaled - self.median
        return scaled if over <= 0 else self.median + min(math.log1p(over), DIVERGED)

    def gain(self, scaled: float) -> float:
        """Return a difference below the median, on the scale, as a difference of log losses."""
        return scaled * self.spread

    def loss(self, scaled: float) -> float:
        """Return the loss at the end of a run that is at a place on the scale."""
        over = min(scaled - self.median, DIVERGED)
        linear = scaled if over <= 0 else self.median + math.expm1(over)
        return math.exp(self.best + self.spread * linear)


def _at(trend: tuple[float, float], share: float) -> float:
    left = -math.log(max(share, 1 / 64))
    return trend[0] * left + trend[1] * left**2


def _trend(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return how log losses fall towards the end of a run, from the steps of all curves.

    A regression in which steps count less the further they are from the others (Huber 1964), towards none.
    """
    steps = [
        (before, after, math.log(earlier / later))
        for curve in curves
        for before, after, earlier, later in zip(
            curve.shares, curve.shares[1:], curve.values, curve.values[1:], strict=False
        )
        if _is_usable(earlier) and _is_usable(later)
    ]
    if not steps:
        return 0.0, 0.0
    before, after = (left_of(np.array([step[at] for step in steps])) for at in (0, 1))
    drop = np.array([step[2] for step in steps])
    basis = np.stack([before - after, before**2 - after**2], axis=1)
    weight = np.ones(len(drop))
    found = np.zeros(2)
    for _ in range(5):
        weighted = basis * weight[:, None]
        found = np.linalg.solve(basis.T @ weighted + np.diag([1e-3, 1e-2]), weighted.T @ drop)
        off = np.abs(drop - basis @ found)
        weight = 1 / np.maximum(1.0, off / (1.5 * np.median(off) + 1e-9))
    return float(found[0]), float(found[1])


def _is_usable(value: float) -> bool:
    return math.isfinite(value) and value > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Points of curves as arrays of one length."""

    features: Floats  # (points, features)
    trial: NDArray[np.int64]  # which curve each belongs to
    left: Floats  # -log(share): 0 at the end of a run
    scaled: Floats  # on the scale of `Scale`
    noise: Floats  # variance that is known to be a point's own

    def first(self, number: int) -> Points:
        """Return the first points."""
        return Points(
            features=self.features[:number],
            trial=self.trial[:number],
            left=self.left[:number],
            scaled=self.scaled[:number],
            noise=self.noise[:number],
        )

    @property
    def number(self) -> int:
        return len(self.scaled)


def points_of(curves: Sequence[Curve], scale: Scale, *, max_points: int = MAX_POINTS) -> Points:
    """Return the points of curves that the model is given, in the order of the curves."""
    rows = [
        (index, curve.shares[at], scale(curve.values[at], curve.shares[at]))
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
        left=left_of(np.array([row[1] for row in rows])),
        scaled=scaled,
        # A run that goes wrong says little of its neighbours: a quarter of good settings may do so by chance.
        noise=0.25 * np.maximum(scaled - scale.median, 0.0) ** 2,
    )


def left_of(shares: Floats) -> Floats:
    """Return -log(share), on which curves are nearly straight; a power law is, exactly."""
    return -np.log(np.clip(shares, 1 / 64, 1.0))


def _chosen(number: int, most: int) -> list[int]:
    """Return the places of at most so many points of a curve: its last, its first, and evenly in between."""
    if number <= most:
        return list(range(number))
    if most == 1:
        return [number - 1]
    return sorted({round(at * (number - 1) / (most - 1)) for at in range(most)})
