"""Lay out the training examples of a whole run in the order of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from autosft.profiles.dataset.order import ids_in_order, longest_first
from autosft.profiles.dataset.prepared import Split, split_name
from autosft.profiles.errors import UserError
from autosft.studies.trial import TrialJob
from autosft.workers.data import load_split

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class RunExamples:
    """The examples of the whole run, in the order of training.

    `dataset` holds num_steps x effective_batch_size examples; `tokens_at_step[n]` non-padding tokens have
    been seen after n optimizer steps, `padded_at_step[n]` with their padding, where there is any; `worst` are
    the positions of the largest micro batch.
    """

    dataset: Dataset
    num_steps: int
    tokens_at_step: tuple[int, ...]
    padded_at_step: tuple[int, ...]
    evaluation_at_step: Mapping[int, int]  # optimizer step -> number of the evaluation, from 1
    worst: range


def order_examples(job: TrialJob) -> RunExamples:
    """Order the training examples: a seeded permutation per epoch, cut into full steps, longest first.

    Examples that truncation leaves without a scored token are skipped.  The order depends on the seed,
    the data and seq_len, never on the plan.
    """
    settings = job.settings
    dataset = load_split(job, split_name(Split.TRAIN, settings.max_rounds))
    columns = dataset.with_format("numpy")
    usable = np.flatnonzero(columns["first_label"][:] < settings.seq_len)
    if len(usable) == 0:
        raise UserError(
            f"no training example has an answer within the first {settings.seq_len} tokens.",
            remedy="Choose a longer --seq-len.",
        )
    lengths = np.minimum(columns["length"][:], settings.seq_len)
    order = ids_in_order(usable, settings.order, settings.effective_batch_size)
    # Within a step the longest come first: a step is the same sum in any order, and micro batches of similar
    # lengths need little padding.
    order = longest_first(order, lengths)
    num_steps, steps = len(order), lengths[order]
    tokens = steps.sum(axis=1).cumsum()
    micro_batches = steps.reshape(-1, job.plan.micro_batch)
    is_row = job.pinned.padding_free
    sizes = micro_batches.sum(axis=1) if is_row else micro_batches.max(axis=1) * job.plan.micro_batch
    worst = int(sizes.argmax()) * job.plan.micro_batch
    padded = sizes.reshape(num_steps, -1).sum(axis=1).cumsum()
    return RunExamples(
        dataset=dataset.select(order.ravel().tolist()),
        num_steps=num_steps,
        tokens_at_step=(0, *(int(count) for count in tokens)),
        padded_at_step=(0, *(int(count) for count in padded)),
        evaluation_at_step=evaluation_steps(num_steps, job.pinned.num_evaluations),
        worst=range(worst, worst + job.plan.micro_batch),
    )


def evaluation_steps(num_steps: int, num_evaluations: int) -> dict[int, int]:
    """Return {optimizer step: evaluation number}, evenly spaced, the last at the end.

    A run with fewer steps than evaluations keeps the later number of those that fall on one step.
    """
    return {math.ceil(k * num_steps / num_evaluations): k for k in range(1, num_evaluations + 1)}
