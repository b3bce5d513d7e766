"""Draw the micro batches of a training run from the lengths of its examples."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autosft.profiles.dataset.order import ids_in_order, longest_first
from autosft.profiles.memory.program.program import Shape
from autosft.profiles.recipe import LengthProfile, RunOrder

NUM_COMPANY_DRAWS = 8
#: Epochs drawn to find the longest row where the run's order is not known.
NUM_ROW_PASSES = 8
MAX_ROW_EXAMPLES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A collated micro batch: its shape, and whether it has padding."""

    shape: Shape
    padded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The first micro batches of a run, in order, and the largest one of the whole run."""

    first: tuple[Batch, ...]
    worst: Batch


def draw_order(
    lengths: LengthProfile, micro_batch: int, *, num_batches: int, seed: int, per_step: int = 1
) -> Order:
    """Shuffle the examples, collate them `micro_batch` at a time, and return the first and the worst batches.

    `per_step`: how many micro batches, over all devices, are sorted together, longest example first; 1 for
    trainers that do not sort.

    The worst batch is padded to the longest example of the data, which occurs in every epoch.  Its other rows
    are drawn several times and the draw with the most scored tokens is kept, since other batches of the run
    may have more of them than the one with the longest example.  Data smaller than a micro batch is repeated,
    as in a run of several epochs.
    """
    rng = np.random.default_rng((seed, micro_batch))
    ids = rng.permutation(len(lengths.lengths))
    sizes = np.asarray(lengths.lengths)
    step = micro_batch * per_step
    num_steps = max(1, -(-min(num_batches, len(ids) // micro_batch) // per_step))
    ids = longest_first(np.resize(ids, (num_steps, step)), sizes).reshape(-1, micro_batch)
    first = [collate(lengths, batch) for batch in ids[:num_batches]]
    longest = int(np.argmax(sizes))
    drawn = longest_first(rng.integers(0, len(sizes), size=(NUM_COMPANY_DRAWS, step - 1)), sizes)
    candidates = [collate(lengths, np.array([longest, *length[: micro_batch - 1]])) for length in drawn]
    worst = max(candidates, key=lambda batch: batch.shape.scored)
    return Order(first=tuple(first), worst=worst)


def draw_row_order(
    lengths: LengthProfile,
    micro_batch: int,
    *,
    num_batches: int,
    seed: int,
    per_step: int = 1,
    order: RunOrder | None = None,
) -> Order:
    """Do what `draw_order` does for padding-free micro batches, which are packed into one row each.

    With the run's `order` these are its actual rows (of its first million examples), without it those of
    several epochs.  The worst batch is as long as the longest row and has as many scored tokens as any row.
    """
    order = order or RunOrder(seed=seed, num_examples=NUM_ROW_PASSES * len(lengths.lengths))
    tokens, scored = (
        item.reshape(-1, micro_batch).sum(axis=1).tolist()
        for item in _laid_out(lengths, order, micro_batch * per_step)
    )
    first = [row(*sums, micro_batch) for sums in zip(tokens[:num_batches], scored[:num_batches], strict=True)]
    return Order(first=tuple(first), worst=row(max(tokens), max(scored), micro_batch))


@functools.lru_cache(maxsize=2)  # the planner asks for all splits of a step in turn
def _laid_out(
    lengths: LengthProfile, order: RunOrder, step: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return tokens and scored tokens of a run's examples in its order, longest first within each step."""
    sizes = np.asarray(lengths.lengths)
    scored = np.minimum(np.asarray(lengths.scored), sizes)
    order = dataclasses.replace(order, num_examples=min(order.num_examples, MAX_ROW_EXAMPLES))
    usable = np.flatnonzero(scored) if scored.any() else np.arange(len(sizes))
    ids = longest_first(ids_in_order(usable, order, step), sizes)
    return sizes[ids], scored[ids]


def row(num_tokens: int, num_scored: int, num_examples: int) -> Batch:
    """Return a batch packed into one row; the first token of an example is never scored."""
    seq = max(2, num_tokens)
    shape = Shape(batch=num_examples, seq=seq, scored=min(max(1, num_scored), seq - 1), is_row=True)
    return Batch(shape=shape, padded=False)


def evaluation_batch(lengths: LengthProfile, micro_batch: int) -> Batch:
    """Return the largest batch of an evaluation, which processes the examples longest first.

    The first batch is the longest; its scored tokens are the maximum over all batches.
    """
    sizes = np.asarray(lengths.lengths)
    order = longest_first(np.arange(len(sizes))[None], sizes)[0]
    first = collate(lengths, order[:micro_batch])
    scored = np.minimum(np.asarray(lengths.scored), sizes)[order]
    sums = np.add.reduceat(scored, np.arange(0, len(order), micro_batch))
    most = max(first.shape.scored, int(sums.max()))
    return dataclasses.replace(first, shape=dataclasses.replace(first.shape, scored=most))


def collate(lengths: LengthProfile, ids: np.ndarray) -> Batch:
    """Return the shape of a padded batch; a length divisible by 8 is raised by one.

    The efficient attention kernel uses a mask of such a length as it is and pads any other; only the second
    case, which needs slightly more memory, is traced.
    """
    sizes = [lengths.lengths[i] for i in ids]
    seq = max(2, *sizes)
    padded = min(sizes) < seq
    if padded and seq % 8 == 0:
        seq += 1
    scored = max(1, sum(min(lengths.scored[i], lengths.lengths[i]) for i in ids))
    return Batch(shape=Shape(batch=len(sizes), seq=seq, scored=scored), padded=padded)
