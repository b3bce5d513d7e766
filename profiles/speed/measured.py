"""What earlier trials have taught about speed: measured over predicted, for the same kind of run."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from autosft.profiles.recipe import Method, Precision

#: Trials with fewer optimizer steps than this teach nothing of speed: they warm up.
MIN_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KindOfRun:
    """Runs that are as fast as each other, given the same work."""

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
        """Return how fast such runs were over what was predicted (the median); None where there were none."""
        ratios = [row.ratio for row in self.rows if row.kind == kind]
        return statistics.median(ratios) if ratios else None
