"""Limit what trl's chunked head computes on a CPU: the width of its tiles, and which positions it scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def head_tiles(model: Any, *, on_cpu: bool) -> Iterator[None]:
    """Within the block, make the head's tiles no wider than the vocabulary and score labels only, on CPUs.

    Off CUDA trl scores every position, so that compiled shapes stay the same from batch to batch; nothing is
    compiled here.  Prompts and padding then cost as much as what is learned.

    trl allocates tiles of up to 4,096 tokens x 32,768 entries whatever the vocabulary: half a GiB in fp32.
    With a smaller vocabulary most of a tile is never touched.  On CUDA it is allocated all the same; on the
    CPU it is not resident, but counts against the limit that a trial runs under (RLIMIT_DATA).  Results do
    not change, up to the rounding of products over fewer rows: one tile holds the whole vocabulary anyway.
    """
    from trl.trainer import utils

    width, has_kernel = utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton
    if on_cpu:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(width, model.get_output_embeddings().weight.shape[0])
        utils._use_triton = _scores_labels  # in this module it decides which positions are scored, no more
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE, utils._use_triton = width, has_kernel


def _scores_labels(_: Any) -> bool:
    return True
