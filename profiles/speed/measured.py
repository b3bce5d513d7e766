"""Correct predicted speeds by earlier trials: measured over predicted, for the same kind of run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from autosft.profiles.recipe import Method, Precision

#: Trials with fewer optimizer steps are not used: they are still warming up.
MIN_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KindOfRun:
    """What identifies runs of equal speed, given the same work."""

    model_fingerprint: str
    device_name: str
    num_threads: int  # of the CPU
    method: Method
    precision: Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """One trial that had its devices to itself."""

    kind: KindOfRun
    ratio: float  # measured over cold-predicted training tokens a second


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredSpeeds:
    """Trials seen so far, in any order."""

    rows: tuple[SpeedRow, ...] = ()

    def ratio(self, kind: KindOfRun) -> float | None:
        """Return the median of measured over predicted speed of such runs; None without any."""
        ratios = [row.ratio for row in self.rows if row.kind == kind]
        return statistics.median(ratios) if ratios else None
