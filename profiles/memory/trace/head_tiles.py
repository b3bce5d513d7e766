"""Limit the width of the tiles of trl's chunked head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def head_tiles(model: Any, *, on_cpu: bool) -> Iterator[None]:
    """Within the block, make the tiles of trl's head no wider than the vocabulary, on CPUs only.

    trl allocates tiles of up to 4,096 tokens x 32,768 entries whatever the vocabulary: half a GiB in fp32.
    With a smaller vocabulary most of a tile is never touched.  On CUDA it is allocated all the same; on the
    CPU it is not resident, but counts against the limit that a trial runs under (RLIMIT_DATA).  Results do
    not change: one tile holds the whole vocabulary either way.
    """
    from trl.trainer import utils

    width = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    if on_cpu:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(width, model.get_output_embeddings().weight.shape[0])
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = width
