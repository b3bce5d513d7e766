"""Order the examples of a run, by data and settings only, never by the plan."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autosft.profiles.recipe import RunOrder


def ids_in_order(usable: NDArray[np.intp], order: RunOrder, effective_batch_size: int) -> NDArray[np.intp]:
    """Return the ids of the examples of every optimizer step, (step, example).

    Each epoch is a new permutation of `usable`, which is not empty; steps are full.
    """
    if order.max_samples is not None:
        drawn = np.random.default_rng(order.seed).permutation(usable)[: order.max_samples]
        usable = np.sort(drawn)
    num_steps = max(1, order.num_examples // effective_batch_size)
    num_examples = num_steps * effective_batch_size
    num_passes = -(-num_examples // len(usable))
    passes = [np.random.default_rng((order.seed, epoch)).permutation(usable) for epoch in range(num_passes)]
    return np.concatenate(passes)[:num_examples].reshape(num_steps, effective_batch_size)


def longest_first(ids: NDArray[np.intp], sizes: NDArray[np.int64]) -> NDArray[np.intp]:
    """Sort each row of example ids by decreasing length."""
    return np.take_along_axis(ids, np.argsort(-sizes[ids], axis=1, kind="stable"), axis=1)
