"""Limit what trl's chunked head computes on a CPU: the width of its tiles, and which positions it scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from autosft.profiles.memory.host_kernels import padded_size


@contextlib.contextmanager
def head_tiles(model: Any, *, on_cpu: bool, in_few_sizes: bool = False) -> Iterator[None]:
    """Within the block, make the head's tiles no wider than the vocabulary and score labels only, on CPUs.

    Off CUDA trl scores every position, so that compiled shapes stay the same from batch to batch; nothing is
    compiled here.  Prompts and padding then cost as much as what is learned.

    trl allocates tiles of up to 4,096 tokens x 32,768 entries whatever the vocabulary: half a GiB in fp32.
    With a smaller vocabulary most of a tile is never touched.  On CUDA it is allocated all the same; on the
    CPU it is not resident, but counts against the limit that a trial runs under (RLIMIT_DATA).  Results do
    not change, up to the rounding of products over fewer rows: one tile holds the whole vocabulary anyway.

    `in_few_sizes`: the scored positions are padded to one of few numbers (`profiles.memory.host_kernels`).
    """
    from trl.trainer import utils

    width, has_kernel = utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton
    function = utils._ChunkedLogProbFunction
    if on_cpu:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(width, model.get_output_embeddings().weight.shape[0])
        utils._use_triton = _scores_labels  # in this module it decides which positions are scored, no more
    if in_few_sizes:
        utils._ChunkedLogProbFunction = _InFewSizes(function)
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton = width, has_kernel
        utils._ChunkedLogProbFunction = function


@dataclass(frozen=True, slots=True)
class _InFewSizes:
    """trl's head over padded positions, whose results are dropped and whose gradients are zero."""

    function: Any

    def apply(self, hidden: Any, weight: Any, bias: Any, labels: Any, *others: Any) -> Any:
        from torch.nn.functional import pad

        number = len(labels)
        more = padded_size(max(1, number)) - number
        hidden, labels = pad(hidden, (0, 0, 0, more)), pad(labels, (0, more))
        results = self.function.apply(hidden, weight, bias, labels, *others)
        return tuple(None if result is None else result[:number] for result in results)


def _scores_labels(_: Any) -> bool:
    return True
