"""Upper bounds with a stated coverage, learned from measured peaks (split conformal prediction).

The score of a run is measured / predicted.  Among n earlier runs of the same kind, the k-th smallest
score bounds the next one with probability k / (n + 1) (Vovk et al. 2005), whatever the distribution, as
long as runs are exchangeable.  No more than n / (n + 1) can be certified by n runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autosft.profiles.hardware.device_kinds import kind_of_stack
from autosft.profiles.recipe import MemoryEstimate

#: The bound without any measurement; published measurements were within it (docs/memory.md).
PRIOR_UPPER_RATIO = 1.08
#: Added to bounds from other stacks' runs: stacks differ by more than the noise within one.
BORROWED_EXTRA = 0.02
#: A run that ran out of memory at its cap counts as having needed this multiple of it.
OUT_OF_MEMORY_RATIO = 1.02
#: From this many runs of the same stack on, the runs of others are not used.
ENOUGH_ROWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRow:
    """The predicted (median) and measured peak of one run, and its stack.

    `fingerprint` identifies what bounds are learned for: device model, package versions, recipe
    (see `fingerprint`).
    """

    fingerprint: str
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How far a measured peak may exceed its prediction."""

    median_ratio: float  # median of measured / predicted; 1 without rows
    upper_ratio: float  # measured / predicted stays below this ...
    level: float  # ... with this probability
    num_rows: int  # runs behind it
    is_borrowed: bool  # from runs of other stacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Runs seen so far, in any order."""

    rows: tuple[CalibrationRow, ...] = ()

    def with_row(self, row: CalibrationRow) -> Calibration:
        """Return the calibration with one more run."""
        return Calibration(rows=(*self.rows, row))


def row_of(
    estimate: MemoryEstimate, measured_bytes: int | None, *, out_of_memory: bool = False
) -> CalibrationRow | None:
    """Return the calibration row of a finished run, None where its estimate or measurement cannot be used.

    `measured_bytes` is the peak of what `allocated` predicts: live tensors on CUDA, resident memory on the
    CPU. A run that ran out of memory needed more than its cap, which is the upper bound of its need.
    """
    predicted = estimate.uncalibrated_bytes
    if predicted == 0 or estimate.untraced or (measured_bytes is None and not out_of_memory):
        return None  # not fully traced, or not measured
    measured = measured_bytes or 0
    if out_of_memory:  # how much more it needed than its cap it does not say, whatever its peak was
        short = predicted * estimate.need.upper_bytes / max(1, estimate.need.median_bytes)
        measured = math.ceil(OUT_OF_MEMORY_RATIO * short)
    return CalibrationRow(fingerprint=estimate.stack, predicted_bytes=predicted, measured_bytes=measured)


def fingerprint(device_name: str, versions: str, method: str, precision: str, checkpointing: str) -> str:
    """Return the identifier of the stack that a bound belongs to."""
    return "|".join((device_name, versions, method, precision, checkpointing))


def bound_for(calibration: Calibration | None, stack: str, *, level: float = 0.95) -> Bound:
    """Return the bound for a stack: from its own runs, else narrowed by those of its kind of device.

    Only its own runs make it wider than the prior: what another precision, method or version has needed says
    nothing of this one.  Resident memory of CPU trials says nothing of a GPU's allocator, nor the other way
    round.  The reported level is the one that the number of runs supports, at most the requested one.
    """
    rows = calibration.rows if calibration is not None else ()
    own = [row for row in rows if row.fingerprint == stack]
    akin = [row for row in rows if kind_of_stack(row.fingerprint) is kind_of_stack(stack)]
    chosen = own if len(own) >= ENOUGH_ROWS else akin
    if not chosen:
        return Bound(median_ratio=1.0, upper_ratio=PRIOR_UPPER_RATIO, level=0.9, num_rows=0, is_borrowed=True)
    scores = scores_of(chosen)
    upper, supported = conformal_upper(scores, level)
    if chosen is own:
        middle = scores[len(scores) // 2]
        return Bound(
            median_ratio=middle,
            upper_ratio=max(upper, middle),
            level=supported,
            num_rows=len(own),
            is_borrowed=False,
        )
    # A few runs do not make a bound narrower.
    borrowed = PRIOR_UPPER_RATIO if len(akin) < ENOUGH_ROWS else upper + BORROWED_EXTRA
    needed = conformal_upper(scores_of(own), level)[0] + BORROWED_EXTRA if own else 0.0
    return Bound(
        median_ratio=1.0,
        upper_ratio=max(1.0, needed, min(borrowed, PRIOR_UPPER_RATIO)),
        level=supported,
        num_rows=len(akin),
        is_borrowed=True,
    )


def scores_of(rows: Sequence[CalibrationRow]) -> list[float]:
    """Return measured over predicted bytes of runs, sorted."""
    return sorted(row.measured_bytes / row.predicted_bytes for row in rows)


def conformal_upper(scores: Sequence[float], level: float) -> tuple[float, float]:
    """Return (bound, its level) from sorted scores; the largest score where there are too few."""
    n = len(scores)
    rank = min(n, math.ceil((n + 1) * level))
    return scores[rank - 1], min(level, rank / (n + 1))
