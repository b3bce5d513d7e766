"""The micro batches that a training run will really see, drawn from the lengths of its examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autosft.profiles.memory.program import Shape
from autosft.profiles.recipe import LengthProfile

NUM_COMPANY_DRAWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A collated micro batch: its padded shape, and whether any row is padded."""

    shape: Shape
    padded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Micro batches as they follow one another: the first ones, and the largest of the whole run."""

    first: tuple[Batch, ...]
    worst: Batch


def draw_order(lengths: LengthProfile, micro_batch: int, *, num_batches: int, seed: int) -> Order:
    """Shuffle the examples, collate them `micro_batch` at a time, and return the start and the worst.

    The worst batch is padded to the longest example of the data, which comes up in every pass; its other
    rows are drawn with it, several times, and the draw with the most scored tokens is kept: other batches
    of the run may have more of them than the one that the longest example happens to be in.  Data smaller
    than a micro batch is repeated, as a run over several passes does.
    """
    rng = np.random.default_rng((seed, micro_batch))
    ids = rng.permutation(len(lengths.lengths))
    needed = min(num_batches, max(1, len(ids) // micro_batch)) * micro_batch
    ids = np.resize(ids, max(needed, micro_batch))
    first = [collate(lengths, ids[i : i + micro_batch]) for i in range(0, needed or micro_batch, micro_batch)]
    longest = int(np.argmax(lengths.lengths))
    drawn = rng.integers(0, len(lengths.lengths), size=(NUM_COMPANY_DRAWS, micro_batch - 1))
    candidates = [collate(lengths, np.array([longest, *companions])) for companions in drawn]
    worst = max(candidates, key=lambda batch: batch.shape.scored)
    return Order(first=tuple(first), worst=worst)


def collate(lengths: LengthProfile, ids: np.ndarray) -> Batch:
    """Return the shape of a padded batch; a length divisible by 8 counts as one more.

    The efficient attention kernel takes a mask of such a length as it is and pads any other; only the
    second case is traced, which needs slightly more.
    """
    sizes = [lengths.lengths[i] for i in ids]
    seq = max(2, *sizes)
    padded = min(sizes) < seq
    if padded and seq % 8 == 0:
        seq += 1
    scored = max(1, sum(min(lengths.scored[i], lengths.lengths[i]) for i in ids))
    return Batch(shape=Shape(batch=len(sizes), seq=seq, scored=scored), padded=padded)
